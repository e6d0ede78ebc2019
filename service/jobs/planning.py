"""The plan of a job that is being posted: what is known of its model, its tokens, the machines and the artifacts there are."""

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import hf_hub_download
from sqlalchemy.orm import Session

from service.artifacts import ArtifactStore
from service.datasets.tables import Dataset
from service.jobs import cost, ledger, repository
from service.jobs.cost import Rates
from service.jobs.operations import Shape, TokenCounts
from service.jobs.stage_cost import JobCounts, stages_of
from service.jobs.state import Stage
from service.jobs.tables import JobUnit, SelectionJob
from service.models import ADAPTER_CONFIG
from service.settings import ModelSettings

_DATASETS = ("pool", "target")
_EARLIER_JOBS = 50
_LOOKED_UP = 16  # units of a stage whose artifacts are asked for; in a remote store, each is a request


def plan(
    session: Session, store: ArtifactStore, settings: ModelSettings, job: SelectionJob, pool: Dataset, target: Dataset
) -> dict[str, Any]:
    """What the job, not yet written, will cost (`cost.plan`). Token counts are estimates where no earlier job counted them.

    Another tenant's jobs are not looked at: what they computed is found all the same, but not told of.
    """
    earlier = _Earlier(session, store, job, pool, target)
    counts = {}
    for name, dataset in zip(_DATASETS, (pool, target), strict=True):
        counted = earlier.token_counts(name)
        estimate = TokenCounts.of_bytes(dataset.row_count, dataset.byte_count, job.parameters["max_length"])
        counts[name] = (counted or estimate, counted is None)
    job_counts = JobCounts(
        pool=counts["pool"][0],
        target=counts["target"][0],
        budget=job.budget,
        estimated=counts["pool"][1] or counts["target"][1],
    )
    # A reproduction uses nothing of earlier jobs.
    stages = () if job.reproduces else stages_of(job.parameters, job_counts)
    already = {stage: earlier.share(stage) for stage in stages}
    return cost.plan(shape_of(settings, job.model), job.parameters, job_counts, measured_rates(session), already)


def measured_rates(session: Session) -> Rates:
    """What workers have measured so far."""
    rows, worker = repository.stage_rates(session), repository.newest_worker(session)
    return Rates(
        operations={row.stage: row.operations for row in rows if row.operations},
        samples={row.stage: row.samples for row in rows if row.samples},
        matmul={} if worker is None else worker.matmul_rates,
        device=None if worker is None else worker.device,
        memory_bytes=None if worker is None else worker.memory_bytes,
    )


def shape_of(settings: ModelSettings, model: Mapping[str, Any]) -> Shape | str:
    """The shape of a job's resolved model, or why it is not known."""
    try:
        if "base" in model:
            base = shape_of(settings, model["base"])
            adapter = json.loads((settings.folder / model["name"] / ADAPTER_CONFIG).read_text())
            return base if isinstance(base, str) else base.with_adapters(adapter["r"], adapter["target_modules"])
        if model["kind"] == "registered":
            path = str(settings.folder / model["name"] / "config.json")
        else:
            path = hf_hub_download(model["id"], "config.json", revision=model["commit"], etag_timeout=10)
        with open(path) as file:
            return Shape.of_config(json.load(file))
    except ValueError as error:
        return str(error)
    except Exception as error:  # of the hub's client, whatever its HTTP library raises; or a file that is gone
        return f"the model's config.json could not be read ({type(error).__name__})"


class _Earlier:
    """What the tenant's earlier jobs on the same model have left in the store."""

    def __init__(
        self, session: Session, store: ArtifactStore, job: SelectionJob, pool: Dataset, target: Dataset
    ) -> None:
        self._session, self._store = session, store
        self._budget, self._parameters = job.budget, job.parameters
        self._contents = {"pool": pool.fingerprint, "target": target.fingerprint}
        self._rows = {"pool": pool.row_count, "target": target.row_count}
        self._jobs = repository.similar_jobs(
            session, job.tenant_id, model=job.model, limit=_EARLIER_JOBS, **self._contents
        )

    def token_counts(self, dataset: str) -> TokenCounts | None:
        prepared = self._prepared(dataset)
        return None if prepared is None else TokenCounts.of_summary(prepared[f"{dataset}_counts"])

    def _prepared(self, dataset: str) -> Mapping[str, Any] | None:
        """The result of the newest prepare stage that cut the same content to the same length."""
        for job, *contents in self._jobs:
            same_length = job.parameters["max_length"] == self._parameters["max_length"]
            if same_length and contents[_DATASETS.index(dataset)] == self._contents[dataset]:
                return self._units(job, Stage.PREPARE)[0].result
        return None

    def _units(self, job: SelectionJob, stage: Stage) -> list[JobUnit]:
        return ledger.unit_results(self._session, job.id, stage)

    def share(self, stage: Stage) -> float:
        """Of the stage's units, those that need not be computed; of `prepare`, of the samples whose tokens are there."""
        if stage == Stage.PREPARE:
            there = sum(self._rows[name] for name in self._rows if self._has_tokens(name))
            return there / sum(self._rows.values())
        if stage not in cost.STAGE_INPUTS:
            return 0.0
        inputs = cost.stage_inputs(stage, budget=self._budget, parameters=self._parameters, **self._contents)
        for job, pool, target in self._jobs:
            if inputs == cost.stage_inputs(stage, pool, target, job.budget, job.parameters):
                return self._found(self._units(job, stage))
        return 0.0

    def _has_tokens(self, dataset: str) -> bool:
        prepared = self._prepared(dataset)
        return prepared is not None and self._store.exists(prepared[f"{dataset}_tokens"])

    def _found(self, units: list[JobUnit]) -> float:
        looked_up = units[:: max(1, len(units) // _LOOKED_UP)]
        there = sum(self._store.exists(f"{unit.artifact_key}.json") for unit in looked_up)
        return there / len(looked_up) if looked_up else 0.0
