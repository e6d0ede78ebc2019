"""Comparison of two jobs: by their Merkle roots, and where those differ, by how far the results are apart."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from winnow.client import Winnow, WinnowError

Json = dict[str, Any]
Array = npt.NDArray[Any]

_COLUMNS = ["influence", "weight", "rank"]


def compare(client: Winnow, first: str, second: str) -> Json:
    """Whether two succeeded jobs have the same results, bit for bit, and if not, how far these are apart.

    Where they differ it downloads both, and holds some 60 bytes a sample in memory.

    Returns:
        equal, weights_root (both), shared_artifacts (how many artifacts units of both jobs share), differs (versions, code,
        device and dtype, where they are not the same), and, unless equal or the weights are deleted: influence and weight, each
        with largest_difference, mean_difference and largest_value, of the samples that have an influence in both jobs,
        in_one_only (how many have one in one job alone), rank_correlation (Spearman, of the influences; None where all values of
        a job are equal), selection {of, in_both, same_order}.

    Raises:
        ValueError: the jobs are over pools of different sizes.
        WinnowError: the service refused; a job that has not succeeded has nothing to compare.
    """
    provenances = [client.provenance(job_id) for job_id in (first, second)]
    roots = [provenance["weights_root"] for provenance in provenances]
    one, other = (provenance["record"] for provenance in provenances)
    selections = [record.get("selection_sha256") for record in (one, other)]
    artifacts = [{unit["artifact"] for unit in record.get("units", ())} for record in (one, other)]
    found: Json = {
        "first": first,
        "second": second,
        "weights_root": roots,
        "equal": roots[0] == roots[1] and (None in selections or selections[0] == selections[1]),
        "shared_artifacts": len(artifacts[0] & artifacts[1]),
        "differs": _differs(one, other),
    }
    if found["equal"]:
        return found
    try:
        results = [_results(client, job_id) for job_id in (first, second)]
    except WinnowError as error:
        if error.status != 404:
            raise
        return found | {"missing": error.detail}
    if results[0]["rank"].size != results[1]["rank"].size:
        raise ValueError("the jobs are over pools of different sizes and cannot be compared")
    return found | _figures(*results)


def is_within(found: Json, tolerance: float) -> bool:
    """Whether no influence and no weight differs by more than `tolerance` times the largest of the first job."""
    if found["equal"]:
        return True
    columns = [found.get(name) for name in ("influence", "weight")]
    return found.get("in_one_only") == 0 and all(
        c is not None and c["largest_difference"] <= tolerance * c["largest_value"] for c in columns
    )


def _differs(one: Json, other: Json) -> dict[str, list[Any]]:
    pairs = {name: [one.get(name), other.get(name)] for name in ("device", "dtype")}
    for kind in ("versions", "code"):
        then, now = one.get(kind, {}), other.get(kind, {})
        pairs |= {f"{kind}.{name}": [then.get(name), now.get(name)] for name in sorted(then.keys() | now.keys())}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _results(client: Winnow, job_id: str) -> dict[str, Array]:
    """influence (NaN: none) and weight float64, rank int64 (-1: not selected), each [n_samples]."""
    with tempfile.TemporaryDirectory() as folder:
        path = client.export(job_id, Path(folder) / "export.parquet", selected_only=False, include=None)
        table = pq.read_table(path, columns=_COLUMNS)
    rank = table["rank"].fill_null(-1).to_numpy()
    values = {name: table[name].to_numpy().astype(np.float64) for name in ("influence", "weight")}  # null becomes NaN
    return {"rank": rank, **values}


def _figures(one: dict[str, Array], other: dict[str, Array]) -> Json:
    known = [~np.isnan(side["influence"]) for side in (one, other)]
    both = known[0] & known[1]
    if not both.any():
        raise ValueError("no sample has an influence in both jobs, so they cannot be compared")
    figures: Json = {"in_one_only": int((known[0] != known[1]).sum())}
    for name in ("influence", "weight"):
        difference = np.abs(one[name] - other[name])[both]
        figures[name] = {
            "largest_difference": float(difference.max()),
            "mean_difference": float(difference.mean()),
            "largest_value": float(np.abs(one[name][both]).max()),
        }
    figures["rank_correlation"] = rank_correlation(one["influence"][both], other["influence"][both])
    first, second = (
        np.argsort(side["rank"], kind="stable")[np.count_nonzero(side["rank"] < 0) :] for side in (one, other)
    )
    figures["selection"] = {
        "of": first.size,
        "in_both": np.intersect1d(first, second, assume_unique=True).size,
        "same_order": np.array_equal(first, second),
    }
    return figures


def rank_correlation(one: Array, other: Array) -> float | None:
    """Spearman, of two vectors of finite values; None where all values of either are equal."""
    a, b = _mean_ranks(one), _mean_ranks(other)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else None


def _mean_ranks(values: Array) -> Array:
    """Rank of each value, from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
