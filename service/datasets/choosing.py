"""Chooses the samples of a ready-made target among the rows of its split."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from service.datasets.files.batches import NumberedRow
from service.datasets.presets import Preset
from service.datasets.values import InvalidRow
from service.http.errors import Unprocessable


@dataclass(frozen=True, slots=True)
class _Candidate:
    place: int
    id: str
    row: dict[str, Any]

    def __lt__(self, other: "_Candidate") -> bool:  # a heap gives up its least: here the last in order
        return (self.place, self.id) > (other.place, other.id)


def chosen(rows: Iterable[NumberedRow], preset: Preset, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """So many rows, fewer where there are not as many, each with an `id`, and with what it was spread over as its `source`.

    Which ones depends on the numbers of the rows, what they are spread over and the seed, on nothing else. The first samples of a
    larger count are those of a smaller one. Memory holds `count` rows for each value that they are spread over.

    Raises:
        Unprocessable: a row cannot be read, or lacks the column that they are spread over.
    """
    groups: dict[str, list[_Candidate]] = {}
    for number, row in rows:
        if isinstance(row, InvalidRow):
            raise Unprocessable(f"row {number} of {preset.hub.id} {row}", code="invalid_rows")
        source = _source(row, number, preset)
        group = groups.setdefault(source, [])
        for copy in range(1, preset.copies + 1):
            name = f"{preset.name}-{number}" + (f"-{copy}" if preset.copies > 1 else "")
            place = xxhash.xxh64_intdigest(name.encode(), seed)
            candidate = _Candidate(place, name, {"id": name, **row, "source": source, "copy": copy})
            if len(group) < count:
                heapq.heappush(group, candidate)
            else:
                heapq.heappushpop(group, candidate)
    ranked = [
        (rank, candidate) for group in groups.values() for rank, candidate in enumerate(sorted(group, reverse=True))
    ]
    ranked.sort(key=lambda each: (each[0], each[1].place, each[1].id))
    return (candidate.row for _, candidate in ranked[:count])


def _source(row: dict[str, Any], number: int, preset: Preset) -> str:
    if preset.spread is None:
        return preset.name
    value = row.get(preset.spread.column)
    if not isinstance(value, str):
        raise Unprocessable(
            f"row {number} of {preset.hub.id} has no {preset.spread.column}, by which the preset {preset.name} tells its"
            f" {preset.spread.over}: name a revision that has it, or import the dataset with a template of your own",
            code="invalid_rows",
        )
    return value.partition(preset.spread.until)[0] if preset.spread.until else value
