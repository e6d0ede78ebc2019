"""What two jobs have in common: their Merkle roots, else figures of how far they are apart."""

import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from service.client import Winnow, WinnowError

Json = dict[str, Any]
Pair = npt.NDArray[np.float32]

_BATCH = 16_384
_BUCKETS = 2**20


class _Columns:
    """Figures of one column of both jobs, as its values come: (2, m) at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.largest = self.most = self._sum = 0.0

    def add(self, pair: Pair) -> None:
        values = pair.astype(np.float64)
        differences = np.abs(values[0] - values[1])
        self.count += differences.size
        self.largest = max(self.largest, float(differences.max()))
        self.most = max(self.most, float(np.abs(values[0]).max()))
        self._sum += float(differences.sum())

    def figures(self) -> Json:
        return {
            "largest_difference": self.largest,
            "mean_difference": self._sum / self.count,
            "largest_value": self.most,
        }


def compare(client: Winnow, first: str, second: str) -> Json:
    """Whether two succeeded jobs found the same, bit for bit, and where they did not, how far they are apart.

    Reads both jobs' weights as streams; holds nothing of them but 8 bytes a sample in a temporary file.

    Returns:
        equal, weights_root (both), shared_artifacts (units of both jobs with one result), differs (versions, code, device, dtype:
        what is not the same), and, unless equal or the weights are deleted: influence and weight, each with largest_difference,
        mean_difference and largest_value, rank_correlation (Spearman, of influences), selection {of, in_both, same_order}.

    Raises:
        ValueError: the jobs are over pools of different sizes.
        WinnowError: the service refused; a job that has not succeeded has nothing to compare.
    """
    records = [client.provenance(job_id) for job_id in (first, second)]
    roots = [record["weights_root"] for record in records]
    one, other = (record["record"] for record in records)
    selections = [record.get("selection_sha256") for record in (one, other)]
    found: Json = {
        "first": first,
        "second": second,
        "weights_root": roots,
        "equal": roots[0] == roots[1] and (None in selections or selections[0] == selections[1]),
        "shared_artifacts": len(_artifacts(one) & _artifacts(other)),
        "differs": _differs(one, other),
    }
    if found["equal"]:
        return found
    try:
        return found | _figures(client, first, second)
    except WinnowError as error:
        if error.status != 404:
            raise
        return found | {"missing": error.detail}


def is_within(found: Json, tolerance: float) -> bool:
    """Whether no influence and no weight differs by more than `tolerance` times the largest of the first job."""
    if found["equal"]:
        return True
    columns = [found.get(name) for name in ("influence", "weight")]
    return all(c is not None and c["largest_difference"] <= tolerance * c["largest_value"] for c in columns)


def _artifacts(record: Json) -> set[str]:
    return {unit["artifact"] for unit in record.get("units", ())}


def _differs(one: Json, other: Json) -> dict[str, list[Any]]:
    pairs = {name: [one.get(name), other.get(name)] for name in ("device", "dtype")}
    for kind in ("versions", "code"):
        then, now = one.get(kind, {}), other.get(kind, {})
        pairs |= {f"{kind}.{name}": [then.get(name), now.get(name)] for name in sorted(then.keys() | now.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _figures(client: Winnow, first: str, second: str) -> Json:
    influence, weight = _Columns(), _Columns()
    counts = np.zeros((2, _BUCKETS), np.int64)
    with tempfile.TemporaryFile() as kept:
        pairs = _pairs(client.weights(first), client.weights(second))
        while rows := list(islice(pairs, _BATCH)):
            values = np.array([[row["influence"] for row in side] for side in zip(*rows, strict=True)], np.float32)
            influence.add(values)
            weight.add(np.array([[row["weight"] for row in side] for side in zip(*rows, strict=True)], np.float32))
            for side in (0, 1):
                counts[side] += np.bincount(_buckets(values[side]), minlength=_BUCKETS)
            kept.write(np.ascontiguousarray(values.T).tobytes())
        correlation = _rank_correlation(kept, counts)
    ranks = [[row["index"] for row in client.selected(job_id)] for job_id in (first, second)]
    in_both = len(set(ranks[0]) & set(ranks[1]))
    return {
        "influence": influence.figures(),
        "weight": weight.figures(),
        "rank_correlation": correlation,
        "selection": {"of": len(ranks[0]), "in_both": in_both, "same_order": ranks[0] == ranks[1]},
    }


def _pairs(one: Iterable[Json], other: Iterable[Json]) -> Iterator[tuple[Json, Json]]:
    try:
        yield from zip(one, other, strict=True)
    except ValueError as error:
        raise ValueError("the jobs are over pools of different sizes: there is nothing to compare") from error


def _buckets(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Numbers that rise with the values: their first 20 bits, so that about 3 digits decide."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return (np.where(bits >> 31, ~bits, bits | np.uint32(2**31)) >> 12).astype(np.int64)


def _rank_correlation(kept: IO[bytes], counts: npt.NDArray[np.int64]) -> float | None:
    """Spearman's, of the pairs in the file; values of one bucket count as equal. None where one side has no other values."""
    n = int(counts[0].sum())
    ranks = np.cumsum(counts, axis=1) - (counts - 1) / 2 - (n + 1) / 2  # mean rank of each bucket, less the mean of all
    sums = np.zeros(3)
    kept.seek(0)
    while part := kept.read(8 * _BATCH):
        pairs = np.frombuffer(part, np.float32).reshape(-1, 2)
        a, b = (ranks[side][_buckets(pairs[:, side])] for side in (0, 1))
        sums += [a @ b, a @ a, b @ b]
    return float(sums[0] / np.sqrt(sums[1] * sums[2])) if sums[1] and sums[2] else None
