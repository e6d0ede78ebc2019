"""Two results beside each other: how far the selections overlap, how influences agree, and what differs in what was asked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from service.results import repository
from service.results.service import FinishedJob
from winnow.comparison import rank_correlation
from winnow.merkle import CHUNK_SIZE

MOST_PAIRS = 2_000
_MOST_CHUNKS = 64
"""Chunks that are read of a pool, so that comparing takes bounded time: of one of a million samples all."""
_COMPARED = ("model", "pool", "target", "budget", "parameters", "max_length", "dtype", "device", "versions", "code")
_UNCOMPARED = frozenset({"pool.id", "target.id", "model.files"})
"""The datasets' fingerprints say whether their rows are the same, and the model's whether its files are."""

Values = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of the jobs `first` and `second`.

    Attributes:
        is_same_pool: both chose among the same rows, in the same order. If not, samples are the same where their ids are.
        selected: how many each selected.
        in_both: how many samples both selected.
        expected: how many that would be by chance; None: of different pools.
        influence: (m,) each, float32, of the same samples: an even part of the pool, or of what both selected
            where the pools differ.
        rank_correlation: Spearman, of these; None: fewer than two, or all are equal.
        differs: name, and what each record says (None: nothing), where they differ.
    """

    is_same_pool: bool
    selected: tuple[int, int]
    in_both: int
    expected: float | None
    influence: tuple[Values, Values]
    rank_correlation: float | None
    differs: list[tuple[str, Any, Any]]

    @property
    def jaccard(self) -> float:
        """Samples that both selected, of those that any did."""
        return self.in_both / (sum(self.selected) - self.in_both)


def compare(session: Session, first: FinishedJob, second: FinishedJob) -> Comparison:
    """Reads at most a million samples of each."""
    jobs = (first, second)
    is_same_pool = first.pool.fingerprint == second.pool.fingerprint
    selected = [repository.result(session, job.id).summary["selected_count"] for job in jobs]
    if is_same_pool:
        pairs = [_even_part(session, job) for job in jobs]
        in_both = repository.selected_in_both(session, first.id, second.id)
    else:
        found = repository.selected_in_both_by_id(session, first.id, second.id, MOST_PAIRS)
        in_both = found.count
        pairs = [np.array(values, np.float32) for values in (found.first, found.second)]
    known = ~(np.isnan(pairs[0]) | np.isnan(pairs[1]))
    a, b = (values[known] for values in pairs)
    records = [repository.provenance(session, job.id).record for job in jobs]
    return Comparison(
        is_same_pool=is_same_pool,
        selected=(selected[0], selected[1]),
        in_both=in_both,
        expected=selected[0] * selected[1] / first.pool.row_count if is_same_pool else None,
        influence=(a, b),
        rank_correlation=rank_correlation(a, b) if a.size > 1 else None,
        differs=differences(records[0], records[1]),
    )


def _even_part(session: Session, job: FinishedJob) -> Values:
    """(m,) influences at the same places of every job over a pool of this size."""
    chunks = -(-job.pool.row_count // CHUNK_SIZE)
    numbers = np.unique(np.linspace(0, chunks - 1, min(chunks, _MOST_CHUNKS)).round().astype(int))
    wanted = -(-MOST_PAIRS // numbers.size)
    parts = []
    for influence in repository.influence_of_chunks(session, job.id, numbers.tolist()):
        places = np.unique(np.linspace(0, influence.size - 1, min(influence.size, wanted)).round().astype(int))
        parts.append(influence[places])
    return np.concatenate(parts)[:MOST_PAIRS]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two audit records differ in what was asked and with what it was computed: a dotted name, and what each says."""
    found = [dict(_flat({name: record[name] for name in _COMPARED if name in record})) for record in (one, other)]
    names = sorted((found[0].keys() | found[1].keys()) - _UNCOMPARED)
    pairs = [(name, found[0].get(name), found[1].get(name)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in _UNCOMPARED:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value
