"""Chooses the samples of a ready-made target among the rows of its split."""

import heapq
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from service.datasets.files.batches import NumberedRow, each_row
from service.datasets.files.reader import Upload
from service.datasets.import_schemas import Choice
from service.datasets.presets import PRESETS, Preset
from service.datasets.rows.options import RowOptions
from service.datasets.values import InvalidRow
from service.http.errors import Unprocessable


@dataclass(frozen=True, slots=True)
class _Candidate:
    place: int
    number: int
    id: str
    row: dict[str, Any]

    def __lt__(self, other: "_Candidate") -> bool:  # a heap gives up its least: here the last in order
        return (self.place, self.id) > (other.place, other.id)


def wanted(options: RowOptions, choice: Choice) -> list[str] | None:
    """The columns that are looked at, that by which the samples are spread among them."""
    spread = PRESETS[choice.name].spread
    if options.wanted is None or spread is None:
        return None if options.wanted is None else list(options.wanted)
    return list(dict.fromkeys([*options.wanted, spread.column]))


def only_chosen(upload: Upload, choice: Choice, max_row_bytes: int) -> Upload:
    """The upload with the chosen rows in place of all, each under its number.

    Raises (while the rows are read): as the upload, and as `chosen`.
    """

    def parts() -> Generator[NumberedRow]:
        with closing(upload.parts):
            rows = each_row(upload.parts, max_row_bytes)
            yield from chosen(rows, PRESETS[choice.name], choice.count, choice.seed)

    return replace(upload, parts=parts())


def chosen(rows: Iterable[NumberedRow], preset: Preset, count: int, seed: int) -> list[tuple[int, dict[str, Any]]]:
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
            candidate = _Candidate(place, number, name, {"id": name, **row, "source": source, "copy": copy})
            if len(group) < count:
                heapq.heappush(group, candidate)
            else:
                heapq.heappushpop(group, candidate)
    ranked = [
        (rank, candidate) for group in groups.values() for rank, candidate in enumerate(sorted(group, reverse=True))
    ]
    ranked.sort(key=lambda each: (each[0], each[1].place, each[1].id))
    return [(candidate.number, candidate.row) for _, candidate in ranked[:count]]


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
