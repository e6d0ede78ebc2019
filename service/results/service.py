"""Publishing the results of a job, and finding the job that has them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from service import ledger
from service.datasets.tables import Dataset
from service.http.errors import Conflict, Gone
from service.ledger.state import TERMINAL, JobStatus
from service.results import repository
from service.results.chart_schemas import Charts
from service.results.tables import JobResult, Provenance, StoredCharts
from winnow.merkle import CHUNK_SIZE, SELECTION_ROW, chunk_sha256, merkle_root, selection_sha256

HISTOGRAM_BINS = 64
QUANTILE_PERCENTS = (0, 1, 5, 25, 50, 75, 95, 99, 100)
RETRY_AFTER_SECONDS = 5

# Fields beside the summary in the answer, which a summary field of the same name would hide.
RESERVED_SUMMARY_FIELDS = frozenset(
    {"object", "job_id", "name", "labels", "created_at", "sample_count", "selected_count"}
)

_CHUNK_COLUMNS = {
    "job_id": "text",
    "chunk_no": "int4",
    "influence": "float4[]",
    "weight": "float4[]",
    "exact": "bool[]",
    "sha256": "bytea",
}
_SELECTED_COLUMNS = {
    "job_id": "text",
    "rank": "int8",
    "sample_index": "int8",
    "sample_id": "text",
    "source": "text",
    "influence": "float4",
    "weight": "float4",
    "exact": "bool",
}


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """A job that has results. Its pool may have been deleted."""

    id: str
    name: str | None
    labels: dict[str, str]
    pool: Dataset


def require_content(job: FinishedJob, param: str, instead: str) -> None:
    """Raises:
    Gone: the pool has been deleted with its text, which `param` asks for; `instead` says what can be asked for.
    """
    if job.pool.deleted_at is not None:
        raise Gone(
            f"The pool {job.pool.id} has been deleted, including its text; {instead}.", param=param, code="pool_deleted"
        )


def finished_job(session: Session, tenant_id: str, job_id: str, *, or_deleted: bool = False) -> FinishedJob:
    """The tenant's job if it has succeeded.

    Raises:
        NotFound: the tenant has no such job.
        Conflict: it has not succeeded: `job_not_finished`, or `no_results` where it never will.
    """
    job = ledger.require_job(session, tenant_id, job_id, or_deleted=or_deleted)
    if job.status is JobStatus.SUCCEEDED:
        return FinishedJob(job.id, job.name, job.labels, session.get_one(Dataset, job.pool_id))
    if job.status in TERMINAL:
        why = f" ({job.error['detail']})" if job.error else ""
        raise Conflict(
            f"Job {job_id} is {job.status}{why}: it has no results and never will; post a new job.",
            code="no_results",
        )
    can_succeed = job.status is not JobStatus.CANCELLING
    raise Conflict(
        f"Job {job_id} is {job.status}; results are available once it has succeeded."
        if can_succeed
        else f"Job {job_id} is being cancelled and will have no results.",
        code="job_not_finished",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)} if can_succeed else None,
        retry=can_succeed,
    )


def distribution(values: npt.NDArray[np.floating[Any]]) -> dict[str, Any]:
    """What a chart of the values needs, ready for JSON. NaN, where a sample has no influence, is left out.

    Returns:
        histogram {edges (65), counts (64)} of equal bins, quantiles {p0, p1, p5, p25, p50, p75, p95, p99, p100}, mean, std.

    Raises:
        ValueError: there are no values, or one of them is infinite.
    """
    if values.ndim != 1 or np.isnan(values).all():
        raise ValueError(f"values: a vector of at least one is needed, not shape {values.shape}")
    wide = values[~np.isnan(values)].astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(f"values: {int((~np.isfinite(wide)).sum())} of {wide.size} are not finite")
    low, high = float(wide.min()), float(wide.max())
    # Around equal values numpy makes bins half a unit to each side, which a large value is too coarse for.
    pad = max(0.5, abs(low) / 2) if low == high else 0.0
    counts, edges = np.histogram(wide, bins=HISTOGRAM_BINS, range=(low - pad, high + pad))
    quantiles = np.percentile(wide, QUANTILE_PERCENTS)
    return {
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "quantiles": {f"p{p}": q for p, q in zip(QUANTILE_PERCENTS, quantiles.tolist(), strict=True)},
        "mean": float(wide.mean()),
        "std": float(wide.std()),
    }


def publish(
    session: Session,
    *,
    job_id: str,
    influence: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    exact: npt.NDArray[np.bool_],
    selected: npt.NDArray[np.int64],
    sample_ids: Sequence[str],
    sources: Sequence[str | None],
    summary: dict[str, Any],
    provenance: dict[str, Any],
    charts: Charts | None = None,
) -> None:
    """Writes the results of a job in the caller's transaction: weights, selection, summary, charts and audit record.

    `provenance.weights_root` is the `merkle_root` over the `chunk_sha256` of each 16,384 samples in pool order; the record is
    given `selection_sha256`.

    Args:
        influence: (n,) of every pool sample, in pool order, NaN where it took no part, which is answered as null; `weight` (n,),
            not negative; `exact` (n,), whether the influence was computed and not propagated.
        selected: (k,) pool indices, the first taken first; `sample_ids` and `sources` (k,) belong to them.
        summary: what GET results answers with, ready for JSON; `charts`: what GET results/charts does, None where there are none.
        provenance: the audit record, ready for JSON.

    Raises:
        ValueError: an argument has the wrong type, shape or range; it is named, and nothing is written.
    """
    _check_weights(influence, weight, exact)
    _check_selection(selected, sample_ids, sources, influence)
    _check_json("summary", summary)
    _check_json("provenance", provenance)
    if hidden := RESERVED_SUMMARY_FIELDS & summary.keys():
        raise ValueError(f"summary: {sorted(hidden)} are set by publish; choose other names")

    hashes: list[bytes] = []
    repository.copy_in(session, "weight_chunks", _CHUNK_COLUMNS, _chunk_rows(job_id, influence, weight, exact, hashes))
    chosen = (array[selected].tolist() for array in (influence, weight, exact))
    selected_rows = (
        (job_id, rank, *row)
        for rank, row in enumerate(zip(selected.tolist(), sample_ids, sources, *chosen, strict=True))
    )
    repository.copy_in(session, "selected_samples", _SELECTED_COLUMNS, selected_rows)
    counted = {"selected_count": selected.size, **summary}
    session.add(JobResult(job_id=job_id, sample_count=influence.size, summary=counted))
    if charts is not None:
        session.add(StoredCharts(job_id=job_id, charts=charts.model_dump(mode="json")))
    rows = np.empty(selected.size, SELECTION_ROW)
    rows["rank"], rows["index"] = np.arange(selected.size), selected
    rows["influence"], rows["weight"], rows["exact"] = influence[selected], weight[selected], exact[selected]
    record = {**provenance, "selection_sha256": selection_sha256(rows)}
    session.add(Provenance(job_id=job_id, weights_root=merkle_root(hashes), record=record))
    session.flush()


def _chunk_rows(
    job_id: str,
    influence: npt.NDArray[np.float32],
    weight: npt.NDArray[np.float32],
    exact: npt.NDArray[np.bool_],
    hashes: list[bytes],
) -> Iterator[tuple[object, ...]]:
    """The rows of weight_chunks; the hash of each is appended to `hashes`."""
    for chunk_no, start in enumerate(range(0, influence.size, CHUNK_SIZE)):
        cut = slice(start, start + CHUNK_SIZE)
        hashes.append(chunk_sha256(influence[cut], weight[cut], exact[cut]))
        yield job_id, chunk_no, influence[cut].tolist(), weight[cut].tolist(), exact[cut].tolist(), hashes[-1]


def _check_weights(
    influence: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], exact: npt.NDArray[np.bool_]
) -> None:
    n = influence.size
    if n == 0:
        raise ValueError("influence: a job has at least one sample")
    for name, array, dtype in (("influence", influence, "f4"), ("weight", weight, "f4"), ("exact", exact, "?")):
        if array.dtype != np.dtype(dtype):
            raise ValueError(f"{name}: must be {np.dtype(dtype)}, not {array.dtype}")
        if array.shape != (n,):
            raise ValueError(f"{name}: must have shape ({n},) like influence, not {array.shape}")
    for name, bad in (("influence", np.isinf(influence)), ("weight", ~np.isfinite(weight))):
        if (wrong := np.flatnonzero(bad)).size:
            raise ValueError(f"{name}: {wrong.size} of {n} are not finite, the first at index {wrong[0]}")
    if (wrong := np.flatnonzero(weight < 0)).size:
        raise ValueError(f"weight: {wrong.size} of {n} are negative, the first at index {wrong[0]}")
    for name, array in (("weight", weight), ("exact", exact)):
        if (wrong := np.flatnonzero(np.isnan(influence) & (array != 0))).size:
            raise ValueError(f"{name}: {wrong.size} of {n} have no influence, the first at index {wrong[0]}")


def _check_selection(
    selected: npt.NDArray[np.int64],
    sample_ids: Sequence[str],
    sources: Sequence[str | None],
    influence: npt.NDArray[np.float32],
) -> None:
    k, n = selected.size, influence.size
    if selected.dtype != np.int64 or selected.ndim != 1 or k == 0:
        raise ValueError(f"selected: must be a vector of at least one int64, not {selected.dtype} {selected.shape}")
    if selected.min() < 0 or selected.max() >= n:
        raise ValueError(f"selected: must lie in [0, {n}), not [{selected.min()}, {selected.max()}]")
    if np.unique(selected).size != k:
        raise ValueError("selected: holds an index more than once")
    if np.isnan(influence[selected]).any():
        raise ValueError("selected: holds a sample that has no influence")
    for name, column in (("sample_ids", sample_ids), ("sources", sources)):
        if len(column) != k:
            raise ValueError(f"{name}: must have {k} entries like selected, not {len(column)}")


def _check_json(name: str, value: dict[str, Any]) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: is not JSON: {error}") from error
