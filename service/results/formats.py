"""Encoders of exports: batches of columns in, bytes out, one batch in memory at a time.

Lines are put together by Arrow, column by column: a Python loop over rows and values takes several times as long.
"""

import io
import json
from collections.abc import Callable, Generator, Iterable, Mapping
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ByteStream = Generator[bytes, None, None]

_TYPES = {
    "index": pa.int64(),
    "id": pa.string(),
    "source": pa.string(),
    "influence": pa.float32(),
    "weight": pa.float32(),
    "exact": pa.bool_(),
    "selected": pa.bool_(),
    "rank": pa.int64(),
}
# What spreadsheets take for the start of a formula (OWASP, CSV injection); of those, a number alone is none.
_FORMULA, _NUMBER = r"^'*[=+\-@\t\r\n＝＋－＠]", r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class Format(StrEnum):
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


MEDIA_TYPES = {
    Format.JSONL: "application/x-ndjson",
    Format.CSV: "text/csv; charset=utf-8",
    Format.PARQUET: "application/vnd.apache.parquet",
}


def batch_of(columns: Mapping[str, Any]) -> pa.RecordBatch:
    """Rows of an export, from lists or arrays by name, all of one length; content comes as Arrow's arrays (`results.content`).
    Every batch of an export has the same columns."""
    arrays = {name: pa.array(values, _TYPES[name]) if name in _TYPES else values for name, values in columns.items()}
    return pa.RecordBatch.from_pydict(arrays)


def shortest(values: npt.NDArray[np.float32]) -> list[float]:
    """As numbers whose text is as short as reads as the same float32: 0.1, where `tolist` gives 0.10000000149011612."""
    return [float(text) for text in values.astype(str)]


def or_null(values: npt.NDArray[np.float32]) -> list[float | None]:
    """Like `shortest`, with None in place of NaN: an influence that a sample does not have."""
    known = np.isfinite(values).tolist()
    return [number if is_known else None for number, is_known in zip(shortest(values), known, strict=True)]


def masked(influence: npt.NDArray[np.float32]) -> pa.Array:
    """A column with null in place of NaN."""
    return pa.array(influence, mask=np.isnan(influence))


def jsonl(batches: Iterable[pa.RecordBatch]) -> ByteStream:
    """One JSON object a line."""
    for batch in batches:
        parts: list[Any] = []
        for name in batch.schema.names:
            parts += [f'{"," if parts else "{"}"{name}":', _json(batch.column(name))]
        yield _joined(*parts, "}\n", null="null")


def comma_separated(batches: Iterable[pa.RecordBatch], *, escape_formulas: bool = True) -> ByteStream:
    """RFC 4180 with a header; true and false in lower case, null as an empty field.

    `escape_formulas`: an apostrophe goes before a text that a spreadsheet would take for a formula, and before one that looks
    escaped already, so that who removes one from each such text has the texts that there were.
    """
    for number, batch in enumerate(batches):
        if number == 0:
            yield f"{','.join(batch.schema.names)}\r\n".encode()
        parts = [part for name in batch.schema.names for part in (",", _csv(batch.column(name), escape_formulas))]
        yield _joined(*parts[1:], "\r\n", null="")


def _joined(*parts: Any, null: str) -> bytes:
    """The lines made of text columns and the constants between them, concatenated."""
    lines = pc.binary_join_element_wise(*parts, "", null_handling="replace", null_replacement=null)
    return lines.buffers()[2].to_pybytes()  # type: ignore[no-any-return]  # the lines' bytes, without gaps


def _json(column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):
        return _float_text(column)
    if isinstance(column.type, pa.JsonType):  # as it is
        return column.storage
    if not pa.types.is_string(column.type):
        return column.cast(pa.string())
    if pc.any(pc.match_substring_regex(column, r'["\\\x00-\x1f]')).as_py():
        return _encoded(column)
    return pc.binary_join_element_wise('"', column, '"', "")


def _encoded(column: pa.Array) -> pa.Array:
    return pa.array([None if value is None else _encode(value) for value in column.to_pylist()], pa.string())


def _csv(column: pa.Array, escape_formulas: bool) -> pa.Array:
    if pa.types.is_floating(column.type):
        return _float_text(column)
    text = column.storage if isinstance(column.type, pa.JsonType) else column.cast(pa.string())
    if escape_formulas and pa.types.is_string(column.type):
        text = _without_formulas(text)
    is_quoted = pc.match_substring_regex(text, '[",\r\n]')
    if not pc.any(is_quoted).as_py():
        return text
    return pc.if_else(is_quoted, pc.binary_join_element_wise('"', pc.replace_substring(text, '"', '""'), '"', ""), text)


def _without_formulas(text: pa.Array) -> pa.Array:
    is_formula = pc.match_substring_regex(text, _FORMULA)
    if not pc.any(is_formula).as_py():
        return text
    is_formula = pc.and_(is_formula, pc.invert(pc.match_substring_regex(text, _NUMBER)))
    return pc.if_else(is_formula, pc.binary_join_element_wise("'", text, ""), text)


def _float_text(column: pa.Array) -> pa.Array:
    """The shortest text that reads as the same float32. A whole number keeps its point: a reader that guesses a column's type
    from its first lines must not take it for an integer."""
    text = column.cast(pa.string())
    is_whole = pc.invert(pc.match_substring_regex(text, "[.e]"))
    return pc.if_else(is_whole, pc.binary_join_element_wise(text, ".0", ""), text)


class _Sink(io.RawIOBase):
    """A file that pyarrow writes to: buffers until `take`."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any, /) -> int:
        part = bytes(data)
        self._parts.append(part)
        self._position += len(part)
        return len(part)

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


def parquet(batches: Iterable[pa.RecordBatch]) -> ByteStream:
    """One row group a batch; `datasets.load_dataset("parquet", ...)` reads it."""
    sink = _Sink()
    writer: pq.ParquetWriter | None = None
    try:
        for batch in batches:
            if writer is None:
                writer = pq.ParquetWriter(sink, batch.schema, compression="zstd")
            writer.write_batch(batch)
            yield sink.take()
    finally:
        if writer is not None:
            writer.close()
    yield sink.take()


ENCODERS: dict[Format, Callable[[Iterable[pa.RecordBatch]], ByteStream]] = {
    Format.JSONL: jsonl,
    Format.CSV: comma_separated,
    Format.PARQUET: parquet,
}
