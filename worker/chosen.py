"""What was chosen of the pool: ids and sources of the selected samples, and which of them repeat one another or the target."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from service.datasets.storage import Sample, iter_ids, iter_samples, read_samples
from service.datasets.values import NO_SOURCE
from service.storage.artifacts import ArtifactStore

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
    store: ArtifactStore, pool: str, target: str, selected: npt.NDArray[np.int64], ids: Sequence[str]
) -> dict[str, Any]:
    """What the selected samples say, beside one another and the target: the summary's `repeats` and `conversations`.

    Two say the same if nothing but white space differs.

    Args:
        pool, target: their fingerprints.
        selected: (k,) positions in the pool, the first taken first; `ids` (k,) theirs.

    Returns:
        repeats: `duplicates`, of a sample that was taken before, and `overlap`, with the target: each {count, first}, of the
            first hundred {id, same_as}.  conversations: how many of the selected are messages, not plain text.
    """
    in_target: dict[bytes, str] = {}
    for sample in iter_samples(store, target):
        in_target.setdefault(_content(sample), sample.id)
    contents, conversations = {}, 0
    for sample in _samples(store, pool, np.sort(selected)):
        contents[sample.index] = _content(sample)
        conversations += sample.messages is not None
    taken: dict[bytes, str] = {}
    found: dict[str, list[dict[str, str]]] = {"duplicates": [], "overlap": []}
    for index, name in zip(selected.tolist(), ids, strict=True):
        content = contents[index]
        for kind, others in (("duplicates", taken), ("overlap", in_target)):
            if content in others:
                found[kind].append({"id": name, "same_as": others[content]})
        taken.setdefault(content, name)
    repeats = {kind: {"count": len(each), "first": each[:_MAX_NAMED]} for kind, each in found.items()}
    return {"repeats": repeats, "conversations": conversations}


def _samples(store: ArtifactStore, pool: str, rows: npt.NDArray[np.int64]) -> Iterator[Sample]:
    for start in range(0, len(rows), _READ_AT_ONCE):
        yield from read_samples(store, pool, rows[start : start + _READ_AT_ONCE].tolist())


def _content(sample: Sample) -> bytes:
    """A digest of what is said in the sample; runs of white space count as one space."""
    said = sample.text if sample.messages is None else sample.messages
    return hashlib.blake2b(json.dumps(_squeezed([said, sample.tools])).encode(), digest_size=16).digest()


def _squeezed(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, list):
        return [_squeezed(each) for each in value]
    if isinstance(value, dict):
        return {key: _squeezed(value[key]) for key in sorted(value)}
    return value
