"""Planning a job that is being posted, from its model, token counts, measured rates and existing artifacts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from sqlalchemy.orm import Session

from service import ledger
from service.datasets.tables import Dataset
from service.jobs import repository
from service.ledger.tables import SelectionJob
from service.ledger.workers import newest_measured_worker
from service.models.configs import CONFIG
from service.models.shapes import shape_in
from service.plan import estimate
from service.plan.artifact_keys import rendering, result_key
from service.plan.job_counts import JobCounts
from service.plan.operations import Shape, TokenCounts
from service.plan.rates import Rates
from service.plan.stages import JobInputs, Stage
from service.plan.waves import rehearse
from service.settings import ModelSettings
from service.storage.artifacts import ArtifactStore

_EARLIER_JOBS = 50
_MAX_LOOKUPS = 16  # units of a stage whose artifacts are looked up; in a remote store, each is a request


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What a plan needs from the database.

    `artifacts`: by stage, (key, amount of work) of each part; the key is None if no earlier job did that part.
    """

    counts: JobCounts
    rates: Rates
    artifacts: Mapping[Stage, Sequence[tuple[str | None, int]]]


def plan(
    session: Session,
    store: ArtifactStore,
    settings: ModelSettings,
    job: SelectionJob,
    pool: Dataset,
    target: Dataset,
    rates: Rates | None = None,
) -> dict[str, Any]:
    """What the job will cost (`estimate.plan`). Token counts are estimates where no earlier job counted them.

    Queries the hub and the store, which may be remote, after it has ended the session's transaction.
    """
    known = _look_up(session, job, pool, target, rates or measured_rates(session))
    session.close()
    already = {stage: _share_in(store, parts) for stage, parts in known.artifacts.items()}
    return estimate.plan(shape_of(settings, job.model), job.parameters, known.counts, known.rates, already)


def _share_in(store: ArtifactStore, parts: Sequence[tuple[str | None, int]]) -> float:
    total = sum(work for _, work in parts)
    return sum(work for key, work in parts if key is not None and store.exists(key)) / total if total else 0.0


def _look_up(session: Session, job: SelectionJob, pool: Dataset, target: Dataset, rates: Rates) -> _Known:
    """Considers the tenant's own jobs only: artifacts of other tenants' jobs are reused but not revealed."""
    contents = {"pool": pool.fingerprint, "target": target.fingerprint}
    earlier = repository.similar_jobs(session, job.tenant_id, model=job.model, limit=_EARLIER_JOBS, **contents)
    counts: dict[str, TokenCounts] = {}
    tokens: list[tuple[str | None, int]] = []
    for place, (name, dataset) in enumerate((("pool", pool), ("target", target))):
        prepared = None  # the newest tokens of the same content and length
        for other, *fingerprints in earlier:
            same_length = other.parameters["max_length"] == job.parameters["max_length"]
            same_text = rendering(other.parameters) == rendering(job.parameters)
            if same_length and same_text and fingerprints[place] == dataset.fingerprint:
                prepared = ledger.last_result(session, other.id, Stage.PREPARE)
                break
        if prepared is not None:
            counts[name] = TokenCounts.of_summary(prepared[f"{name}_counts"])
        tokens.append((None if prepared is None else prepared[f"{name}_tokens"], dataset.row_count))
    job_counts = JobCounts(
        pool=counts.get("pool") or _estimated(pool, job),
        target=counts.get("target") or _estimated(target, job),
        budget=job.budget,
        estimated=len(counts) < 2,
    )
    # A reproduction uses nothing of earlier jobs.
    if job.reproduces:
        return _Known(counts=job_counts, rates=rates, artifacts={})
    own = _names(job, pool.fingerprint, target.fingerprint, job_counts.selectable)
    names = [(other.id, _names(other, p, t, job_counts.selectable)) for other, p, t in earlier]
    artifacts: dict[Stage, Sequence[tuple[str | None, int]]] = {Stage.PREPARE: tokens}
    for stage in own.keys() - {Stage.PREPARE}:
        same = next((other for other, of_other in names if of_other.get(stage) == own[stage]), None)
        units = [] if same is None else ledger.unit_results(session, same, stage)
        looked_up = units[:: max(1, len(units) // _MAX_LOOKUPS)]
        artifacts[stage] = [(result_key(unit.artifact_key), 1) for unit in looked_up]
    return _Known(counts=job_counts, rates=rates, artifacts=artifacts)


def _names(job: SelectionJob, pool: str, target: str, selectable: float) -> dict[Stage, list[str]]:
    inputs = JobInputs(model={}, pool=pool, target=target, budget=job.budget, parameters=job.parameters)
    return rehearse(inputs, selectable)


def _estimated(dataset: Dataset, job: SelectionJob) -> TokenCounts:
    return TokenCounts.of_bytes(dataset.row_count, dataset.byte_count, job.parameters["max_length"])


def measured_rates(session: Session) -> Rates:
    """What workers have measured so far."""
    rows, worker = repository.stage_rates(session), newest_measured_worker(session)
    return Rates(
        operations={row.stage: row.operations for row in rows if row.operations},
        samples={row.stage: row.samples for row in rows if row.samples},
        matmul={} if worker is None else worker.matmul_rates or {},
        device=None if worker is None else worker.device,
        memory_bytes=None if worker is None else worker.memory_bytes,
    )


def shape_of(settings: ModelSettings, model: Mapping[str, Any]) -> Shape | str:
    """The shape of a job's resolved model, or why it is unknown."""
    try:
        if "base" in model:
            return shape_in(settings.folder / model["name"], shape_of(settings, model["base"]))
        if model["kind"] == "registered":
            return shape_in(settings.folder / model["name"])
        config = hf_hub_download(model["id"], CONFIG, revision=model["commit"], etag_timeout=10)
        return shape_in(Path(config).parent)
    except Exception as error:  # whatever the hub client's HTTP library raises
        return f"the model's config.json could not be read ({type(error).__name__})"
