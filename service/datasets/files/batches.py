"""The rows of an upload as its readers give them: one by one with their numbers, or in batches of columns."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from service.datasets.files.budget import too_long
from service.datasets.values import InvalidRow

_RAW_FACTOR = 16
_ROWS_AT_ONCE = 64
_NO_VALUES = (ValueError, TypeError, ArithmeticError, AttributeError, NotImplementedError)

# A row's number from 1, blank lines counted, and its fields or what is wrong with it.
NumberedRow = tuple[int, dict[str, Any] | InvalidRow]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows in columns, the first of which has the number `first`; `faults` names those that cannot be read, by index."""

    first: int
    columns: pa.RecordBatch
    faults: dict[int, str]

    def rows(self, max_row_bytes: int) -> Iterator[NumberedRow]:
        """Each on its own."""
        has_floats = any(_has_floats(field.type) for field in self.columns.schema)
        for start in range(0, self.columns.num_rows, _ROWS_AT_ONCE):
            piece = self.columns.slice(start, _ROWS_AT_ONCE)
            together = _fields(piece, max_row_bytes)
            for i in range(piece.num_rows):
                if start + i in self.faults:
                    yield self.first + start + i, InvalidRow(self.faults[start + i])
                    continue
                found = (
                    _fields(piece.slice(i, 1), max_row_bytes)
                    if isinstance(together, InvalidRow)
                    else together[i : i + 1]
                )
                if isinstance(found, InvalidRow):
                    yield self.first + start + i, found
                else:
                    row = found[0]
                    yield self.first + start + i, _without_nan(row) if has_floats else row


def each_row(parts: Iterable[NumberedRow | Batch], max_row_bytes: int) -> Iterator[NumberedRow]:
    """The rows one by one, those of batches too."""
    for part in parts:
        if isinstance(part, Batch):
            yield from part.rows(max_row_bytes)
        else:
            yield part


def _fields(rows: pa.RecordBatch, max_row_bytes: int) -> list[dict[str, Any]] | InvalidRow:
    """The fields of each row, or what is wrong where all of them are more than one may be, or one cannot be read."""
    try:
        # What is ignored may make a row larger, but not without end; a list of nulls holds millions of values in a few bytes.
        if rows.nbytes > _RAW_FACTOR * max_row_bytes or sum(map(_values, rows.columns)) > max_row_bytes:
            return too_long(max_row_bytes)
        return list(rows.to_pylist())
    except _NO_VALUES as error:
        return InvalidRow(f"contains an unreadable value: {error}")


def _values(array: pa.Array) -> int:
    """How many values, of all depths, Python would make of it."""
    kind = array.type
    if pa.types.is_map(kind):
        start, stop = (array.offsets[i].as_py() for i in (0, len(array)))
        return len(array) + sum(_values(part.slice(start, stop - start)) for part in (array.keys, array.items))
    if pa.types.is_struct(kind):
        return len(array) + sum(map(_values, array.flatten()))
    return len(array) + (_values(array.flatten()) if pa.types.is_nested(kind) else 0)


def _has_floats(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or any(_has_floats(kind.field(i).type) for i in range(kind.num_fields))


def _without_nan(value: Any) -> Any:
    """The value with null where it has NaN, which is how pandas writes an absent one."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return value
