"""What the stages computed becomes rows in PostgreSQL, in the transaction that ends the job; and how a later job that reproduces
it differs from its provenance."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy.typing as npt
import pyarrow.parquet as pq
from safetensors.numpy import load_file
from sqlalchemy.orm import Session

from service import ledger
from service.datasets.tables import Dataset
from service.jobs.planning import measured_rates
from service.jobs.repository import last_event
from service.ledger.tables import JobUnit, SelectionJob
from service.plan.operations import Shape
from service.plan.rates import Rates
from service.plan.stages import History, JobInputs, Stage
from service.plan.versions import code_version
from service.results import service as results
from service.results.chart_schemas import Charts
from service.storage.artifacts import ArtifactStore
from worker import charts, chosen, costs, summary, verdict
from worker.errors import ModelError

Units = Mapping[Stage, Sequence[JobUnit]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What of a job's results is in the store, read before the transaction that ends the job.

    `arrays` are those of the select stage; `ids` and `sources` those of the selected samples in rank order, `said` what they say
    beside one another; `nonfinite` names the samples that were left out; `landmarks` are rows of the pool, rising, or `all`;
    `charts` lack the stages; `shape` of the model, or why it is unknown.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    ids: Sequence[str]
    sources: Sequence[str | None]
    said: Mapping[str, Any]
    nonfinite: Mapping[str, Any]
    landmarks: Sequence[int] | str
    charts: Charts
    job: JobInputs
    shape: Shape | str

    @classmethod
    def read(cls, store: ArtifactStore, job: JobInputs, done: History, shape: Shape | str) -> Self:
        selection = done[Stage.SELECT][0]
        with store.local(selection.artifact_key) as path:
            arrays = load_file(path)
        ids, sources = chosen.names(store, job.pool, arrays["selected"])
        prepared = done[Stage.PREPARE][-1].result
        return cls(
            arrays=arrays,
            ids=ids,
            sources=sources,
            said=chosen.read(store, job, prepared, arrays["selected"], ids),
            nonfinite=summary.nonfinite(store, job.pool, job.target, selection.result),
            landmarks=_landmarks(store, done),
            charts=charts.read(store, job, done, arrays),
            job=job,
            shape=shape,
        )

    def write(self, session: Session, job: SelectionJob) -> None:
        """Writes weights, selected samples, summary, charts and provenance of the job."""
        found = ledger.unit_results(session, job.id)
        units = {stage: [unit for unit in found if unit.stage == stage] for stage in Stage}
        pool, target = session.get_one(Dataset, job.pool_id), session.get_one(Dataset, job.target_id)
        found_summary = self._summary(units, pool.sources, measured_rates(session))
        timed = charts.stages(found_summary["stages"], last_event(session, job.id, "job.planned"))
        results.publish(
            session,
            job_id=job.id,
            influence=self.arrays["influence"],
            weight=self.arrays["weight"],
            exact=self.arrays["exact"],
            selected=self.arrays["selected"],
            sample_ids=self.ids,
            sources=self.sources,
            summary=found_summary,
            charts=self.charts.model_copy(update={"stages": timed}),
            provenance=_provenance(job, units, pool, target, self.landmarks),
        )

    def _summary(self, units: Units, pool_sources: Mapping[str, int], rates: Rates) -> dict[str, Any]:
        prepared = _prepared(units)
        computed = {stage: [unit.result for unit in each] for stage, each in units.items()}
        found = summary.of_method(computed)
        weights = self.arrays["weight"][self.arrays["selected"]]
        found |= {
            **self.said,
            "costs": costs.of_job(self.shape, self.job, computed, found, rates),
            "unusable": prepared.get("unusable"),  # prepared by the version before: not counted, as the next
            "rendering": prepared.get("rendering"),
            "nonfinite": self.nonfinite,
            "influence": results.distribution(self.arrays["influence"]),
            "weight": results.distribution(weights),
            "sources": chosen.by_source(self.sources, weights, pool_sources),
            "pool": prepared["pool_counts"],
            "target": prepared["target_counts"],
            "dtype": prepared["dtype"],
            "device": prepared["device"],
            "chat_template": prepared["chat_template"],
            "stages": [_stage_summary(stage, each) for stage, each in units.items() if each],
        }
        return {**found, "verdict": verdict.of(found)}


def _prepared(units: Units) -> dict[str, Any]:
    result = units[Stage.PREPARE][-1].result
    assert result is not None
    return result


def _stage_summary(stage: Stage, units: Sequence[JobUnit]) -> dict[str, Any]:
    """Wall seconds from the first start to the last end; compute seconds add up the units that were computed for this job."""
    computed = [unit.result for unit in units if unit.result and not unit.result.get("reused")]
    started = min(unit.started_at for unit in units if unit.started_at)
    finished = max(unit.finished_at for unit in units if unit.finished_at)
    return {
        "stage": stage,
        "units": len(units),
        "reused": len(units) - len(computed),
        "wall_seconds": round((finished - started).total_seconds(), 3),
        "compute_seconds": round(sum(result["seconds"] for result in computed), 3),
        "peak_memory_bytes": max((result["peak_memory_bytes"] for result in computed), default=None),
    }


def _landmarks(store: ArtifactStore, done: History) -> list[int] | str:
    if done[Stage.PREPARE][-1].result["all_exact"]:
        return "all"
    rows: list[int] = []
    for key in dict.fromkeys(unit.spec["tokens"] for unit in done.get(Stage.LANDMARK_GRADIENTS, ())):
        with store.local(key) as path:
            rows += pq.read_table(path, columns=["index"]).column("index").to_pylist()
    return sorted(rows)


def _provenance(
    job: SelectionJob, units: Units, pool: Dataset, target: Dataset, landmarks: Sequence[int] | str
) -> dict[str, Any]:
    prepared = _prepared(units)
    request = json.dumps(job.request, sort_keys=True, separators=(",", ":"))
    return {
        "request": job.request,
        "request_sha256": hashlib.sha256(request.encode()).hexdigest(),
        "tenant": job.tenant_id,
        "api_key": job.key_id,
        "retry_of": job.retry_of,
        "reproduces": job.reproduces,
        "pool": _dataset(pool),
        "target": _dataset(target),
        "model": {
            **job.model,
            "fingerprint": prepared["model_fingerprint"],
            "files": prepared["model_files"],
            "tokenizer_fingerprint": prepared.get("tokenizer_fingerprint"),  # prepared by the version before: has none
            "chat_template": prepared["chat_template"],
        },
        "budget": job.budget,
        "parameters": job.parameters,
        "seed": job.parameters["seed"],  # every random choice of every stage is drawn from it
        "max_length": prepared["max_length"],
        "dtype": prepared["dtype"],
        "device": prepared["device"],
        "versions": prepared["versions"],
        "code": {stage: code_version(stage) for stage, found in units.items() if found},
        "landmarks": landmarks,
        "units": [
            {
                "stage": unit.stage,
                "shard": unit.shard,
                "artifact": unit.artifact_key,
                "attempt": unit.attempt,
                "worker": unit.worker_id,
                "reused": bool(unit.result and unit.result.get("reused")),
            }
            for stage_units in units.values()
            for unit in stage_units
        ],
    }


def _dataset(dataset: Dataset) -> dict[str, Any]:
    origin = {} if dataset.origin is None else {"hub": dataset.origin}
    return {"id": dataset.id, "fingerprint": dataset.fingerprint, "rows": dataset.row_count, **origin}


def differences(record: Mapping[str, Any], prepared: Mapping[str, Any]) -> dict[str, Any]:
    """How the circumstances of a reproduction differ from the provenance `record`: by name, each as {recorded, now}.

    Args:
        prepared: the result of the reproduction's prepare stage.

    Raises:
        ModelError: the model's files differ.
    """
    if prepared["model_fingerprint"] != record["model"]["fingerprint"]:
        now, then = prepared["model_files"], record["model"]["files"]
        changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        raise ModelError(
            "The model's files differ from those of the original job, so it cannot be reproduced:"
            f" {', '.join(changed[:5])}. Register the original model."
        )
    code = {stage: code_version(Stage(stage)) for stage in record["code"] if stage in set(Stage)}
    pairs = {"device": (record["device"], prepared["device"])}
    for kind, then, now in (("versions", record["versions"], prepared["versions"]), ("code", record["code"], code)):
        pairs |= {f"{kind}.{name}": (then.get(name), now.get(name)) for name in sorted(then.keys() | now.keys())}
    return {name: {"recorded": then, "now": now} for name, (then, now) in pairs.items() if then != now}
