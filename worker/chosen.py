"""What was chosen of the pool: ids and sources of the selected samples, and which of them repeat one another or the target."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from service.datasets.storage import Sample, iter_ids, read_samples
from service.datasets.values import NO_SOURCE
from service.plan.stages import JobInputs
from service.storage.artifacts import ArtifactStore
from worker.duplicates import exclusions
from worker.duplicates.repeats import Repeats

_READ_AT_ONCE = 128  # a row may have a megabyte
_MAX_NAMED = 100


def names(store: ArtifactStore, pool: str, selected: npt.NDArray[np.int64]) -> tuple[list[str], list[str | None]]:
    """Ids and sources of the selected samples, in rank order; one pass over the pool's ids, a batch at a time.

    Args:
        pool: its fingerprint.
        selected: (k,) positions in the pool, the first taken first.
    """
    found: dict[int, tuple[str, str | None]] = {}
    wanted = np.sort(selected)
    start = 0
    for ids, sources in iter_ids(store, pool):
        low, high = np.searchsorted(wanted, [start, start + len(ids)])
        for index in wanted[low:high].tolist():
            found[index] = (ids[index - start], sources[index - start])
        start += len(ids)
    rows = [found[index] for index in selected.tolist()]
    return [row[0] for row in rows], [row[1] for row in rows]


def by_source(
    sources: Sequence[str | None], weights: npt.NDArray[np.floating[Any]], pool: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """For each source of the selection, the most frequent first: samples in the pool, selected samples, the sum of their weights.

    Args:
        sources: (k,) of the selected samples; `weights` (k,) theirs.
        pool: by source, how many samples of the pool.
    """
    weight_of: Counter[str] = Counter()
    for source, weight in zip(sources, weights.tolist(), strict=True):
        weight_of[source or NO_SOURCE] += weight
    return {
        source: {"pool": pool.get(source, 0), "selected": count, "weight": round(weight_of[source], 4)}
        for source, count in Counter(source or NO_SOURCE for source in sources).most_common()
    }


def read(
    store: ArtifactStore,
    job: JobInputs,
    prepared: Mapping[str, Any],
    selected: npt.NDArray[np.int64],
    ids: Sequence[str],
) -> dict[str, Any]:
    """What the selected samples say, beside one another and the target: the summary's `repeats`, `excluded` and `conversations`.

    Args:
        prepared: the result of the job's prepare stage.
        selected: (k,) positions in the pool, the first taken first; `ids` (k,) theirs.

    Returns:
        repeats: `duplicates` and `overlap`: how many of the `pool` repeat another one of it, or one of the target {exact, near,
            repeated}, how many were `excluded`, and how many of the selected do {count, first}, of the first hundred {id,
            same_as}; None if the job was prepared by a version that looked for none.
        excluded: what an option left out of the job {count, by_reason, first}, of the first hundred {index, id, reason, same_as};
            None if nothing.
        conversations: how many of the selected are messages, not plain text.
    """
    conversations = sum(sample.messages is not None for sample in _samples(store, job.pool, np.sort(selected)))
    if (found := prepared.get("repeats")) is None:
        return {"repeats": None, "excluded": None, "conversations": conversations}
    duplicates, overlap = (Repeats.read(store, found["keys"][kind]) for kind in ("duplicates", "overlap"))
    group = np.where(duplicates.is_repeat, duplicates.same_as, np.arange(len(duplicates.same_as)))
    target_ids = [name for names, _ in iter_ids(store, job.target) for name in names]
    first_of: dict[int, str] = {}
    repeats: dict[str, list[dict[str, str]]] = {"duplicates": [], "overlap": []}
    for index, name in zip(selected.tolist(), ids, strict=True):
        if (before := first_of.setdefault(int(group[index]), name)) != name:
            repeats["duplicates"].append({"id": name, "same_as": before})
        if overlap.is_repeat[index]:
            repeats["overlap"].append({"id": name, "same_as": target_ids[overlap.same_as[index]]})
    excluded = prepared.get("exclusions")
    left_out = {} if excluded is None else excluded["by_reason"]
    return {
        "repeats": {
            kind: {
                "pool": found[kind],
                "excluded": left_out.get(reason, 0),
                "count": len(repeats[kind]),
                "first": repeats[kind][:_MAX_NAMED],
            }
            for kind, reason in (("duplicates", "duplicate"), ("overlap", "overlap"))
        },
        "excluded": None if excluded is None else _excluded(store, job.pool, prepared, group, overlap, target_ids),
        "conversations": conversations,
    }


def _excluded(
    store: ArtifactStore,
    pool: str,
    prepared: Mapping[str, Any],
    group: npt.NDArray[np.int64],
    overlap: Repeats,
    target_ids: Sequence[str],
) -> dict[str, Any]:
    """What an option left out of the job. `group` (n,) numbers what says the same in the pool."""
    numbers = exclusions.read(store, prepared)
    assert numbers is not None
    rows = np.flatnonzero(numbers)[:_MAX_NAMED]
    taking_part = np.flatnonzero(exclusions.taking_part(store, prepared))
    kept = taking_part[np.isin(group[taking_part], group[rows])]
    kept_of = dict(zip(group[kept].tolist(), kept.tolist(), strict=True))
    named = sorted({*rows.tolist(), *kept_of.values()})
    id_of = dict(zip(named, names(store, pool, np.array(named, np.int64))[0], strict=True))
    first = []
    for row in rows.tolist():
        reason = exclusions.REASONS[numbers[row] - 1]
        same_as = target_ids[overlap.same_as[row]] if reason == "overlap" else id_of[kept_of[group[row]]]
        first.append({"index": row, "id": id_of[row], "reason": reason, "same_as": same_as})
    count, by_reason = prepared["exclusions"]["count"], prepared["exclusions"]["by_reason"]
    return {"count": count, "by_reason": by_reason, "first": first}


def _samples(store: ArtifactStore, pool: str, rows: npt.NDArray[np.int64]) -> Iterator[Sample]:
    for start in range(0, len(rows), _READ_AT_ONCE):
        yield from read_samples(store, pool, rows[start : start + _READ_AT_ONCE].tolist())
