"""Publish: what the stages computed becomes rows in PostgreSQL, in the transaction that ends the job."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from safetensors.numpy import load_file
from sqlalchemy.orm import Session

from service.artifacts import ArtifactStore
from service.datasets.storage import iter_ids
from service.datasets.tables import Dataset
from service.jobs import ledger
from service.jobs.state import Stage
from service.jobs.tables import JobUnit, SelectionJob
from service.results import service as results
from worker import summary
from worker.stages import keys


def publish(session: Session, store: ArtifactStore, job: SelectionJob) -> None:
    """Writes weights, selected samples, summary and provenance of the job."""
    units = ledger.unit_results(session, job.id)
    by_stage = {stage: [unit for unit in units if unit.stage == stage] for stage in Stage}
    with store.local(by_stage[Stage.SELECT][0].artifact_key) as path:
        arrays = load_file(path)
    pool = session.get_one(Dataset, job.pool_id)
    target = session.get_one(Dataset, job.target_id)
    ids, sources = _ids_of(store, pool.fingerprint, arrays["selected"])
    results.publish(
        session,
        job_id=job.id,
        influence=arrays["influence"],
        weight=arrays["weight"],
        exact=arrays["exact"],
        selected=arrays["selected"],
        sample_ids=ids,
        sources=sources,
        summary=_summary(store, by_stage, arrays, pool, target, sources),
        provenance=_provenance(store, job, by_stage, pool, target),
    )


def _ids_of(
    store: ArtifactStore, fingerprint: str, selected: npt.NDArray[np.int64]
) -> tuple[list[str], list[str | None]]:
    """Ids and sources of the selected samples, in rank order; one pass over the pool's ids, a batch at a time."""
    found: dict[int, tuple[str, str | None]] = {}
    wanted = np.sort(selected)
    start = 0
    for ids, sources in iter_ids(store, fingerprint):
        low, high = np.searchsorted(wanted, [start, start + len(ids)])
        for index in wanted[low:high].tolist():
            found[index] = (ids[index - start], sources[index - start])
        start += len(ids)
    rows = [found[index] for index in selected.tolist()]
    return [row[0] for row in rows], [row[1] for row in rows]


def _result(units: dict[Stage, list[JobUnit]], stage: Stage) -> dict[str, Any]:
    result = units[stage][0].result
    assert result is not None
    return result


def _summary(
    store: ArtifactStore,
    units: dict[Stage, list[JobUnit]],
    arrays: dict[str, npt.NDArray[Any]],
    pool: Dataset,
    target: Dataset,
    sources: Sequence[str | None],
) -> dict[str, Any]:
    prepared = _result(units, Stage.PREPARE)
    selected = arrays["selected"]
    selected_by_source = Counter(source or "(none)" for source in sources)
    weight_by_source: Counter[str] = Counter()
    for source, weight in zip(sources, arrays["weight"][selected].tolist(), strict=True):
        weight_by_source[source or "(none)"] += weight
    computed = {stage: [unit.result for unit in stage_units] for stage, stage_units in units.items()}
    return {
        **summary.of_method(computed),
        "nonfinite": summary.nonfinite(store, pool.fingerprint, target.fingerprint, computed),
        "influence": results.distribution(arrays["influence"]),
        "weight": results.distribution(arrays["weight"][selected]),
        "sources": {
            source: {
                "pool": pool.sources.get(source, 0),
                "selected": count,
                "weight": round(weight_by_source[source], 4),
            }
            for source, count in selected_by_source.most_common()
        },
        "pool": prepared["pool_counts"],
        "target": prepared["target_counts"],
        "dtype": prepared["dtype"],
        "device": prepared["device"],
        "stages": [_stage_summary(stage, units[stage]) for stage in keys.COMPUTED if units[stage]],
    }


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


def _landmarks(store: ArtifactStore, units: dict[Stage, list[JobUnit]]) -> list[int] | str:
    """The landmarks' rows in the pool, rising; or `all`."""
    if _result(units, Stage.PREPARE)["all_exact"]:
        return "all"
    rows: list[int] = []
    for key in dict.fromkeys(unit.spec["tokens"] for unit in units[Stage.LANDMARK_GRADIENTS]):
        with store.local(key) as path:
            rows += pq.read_table(path, columns=["index"]).column("index").to_pylist()
    return sorted(rows)


def _provenance(
    store: ArtifactStore,
    job: SelectionJob,
    units: dict[Stage, list[JobUnit]],
    pool: Dataset,
    target: Dataset,
) -> dict[str, Any]:
    prepared = _result(units, Stage.PREPARE)
    request = json.dumps(job.request, sort_keys=True, separators=(",", ":"))
    return {
        "request": job.request,
        "request_sha256": hashlib.sha256(request.encode()).hexdigest(),
        "tenant": job.tenant_id,
        "api_key": job.key_id,
        "retry_of": job.retry_of,
        "reproduces": job.reproduces,
        "pool": {"id": pool.id, "fingerprint": pool.fingerprint, "rows": pool.row_count},
        "target": {"id": target.id, "fingerprint": target.fingerprint, "rows": target.row_count},
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
        "code": {stage: keys.code_version(stage) for stage in keys.COMPUTED if units[stage]},
        "landmarks": _landmarks(store, units),
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
