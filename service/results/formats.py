"""Encoders of exports: batches of columns in, bytes out, one batch in memory at a time.

Lines are put together by Arrow, column by column: a Python loop over rows and values takes several times as long.
"""

import io
import json
from collections.abc import Callable, Generator, Iterable, Mapping
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ByteStream = Generator[bytes, None, None]

_MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))
_TYPES = {
    "index": pa.int64(),
    "id": pa.string(),
    "source": pa.string(),
    "influence": pa.float32(),
    "weight": pa.float32(),
    "exact": pa.bool_(),
    "selected": pa.bool_(),
    "rank": pa.int64(),
    "messages": _MESSAGES,
    "text": pa.string(),
}
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


# In the schema of a Parquet file: what it is an export of.
JOB_METADATA, ROOT_METADATA = b"winnow.job_id", b"winnow.weights_root"


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
    """Rows of an export, from lists or arrays by name, all of one length. Every batch of an export has the same columns."""
    arrays = {name: pa.array(values, _TYPES[name]) for name, values in columns.items()}
    return pa.RecordBatch.from_pydict(arrays)


def jsonl(batches: Iterable[pa.RecordBatch]) -> ByteStream:
    """One JSON object a line."""
    for batch in batches:
        yield _json_lines(batch)


def _json_lines(batch: pa.RecordBatch) -> bytes:
    parts: list[Any] = []
    for name in batch.schema.names:
        parts += [f'{"," if parts else "{"}"{name}":', _json(batch.column(name))]
    return _joined(*parts, "}\n", nothing="null")


def comma_separated(batches: Iterable[pa.RecordBatch]) -> ByteStream:
    """RFC 4180 with a header; true and false in lower case, nothing where there is no value."""
    has_header = False
    for batch in batches:
        if not has_header:
            yield f"{','.join(batch.schema.names)}\r\n".encode()
            has_header = True
        yield _csv_lines(batch)


def _csv_lines(batch: pa.RecordBatch) -> bytes:
    parts: list[Any] = []
    for name in batch.schema.names:
        parts += [*([","] if parts else []), _csv(batch.column(name))]
    return _joined(*parts, "\r\n", nothing="")


def _joined(*parts: Any, nothing: str) -> bytes:
    """The lines that columns of text and the constants between them make, as one piece; `nothing` stands for a null."""
    lines = pc.binary_join_element_wise(*parts, "", null_handling="replace", null_replacement=nothing)
    return lines.buffers()[2].to_pybytes()  # type: ignore[no-any-return]  # the lines' bytes, one behind the other


def _json(column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):
        return _float_text(column)
    if pa.types.is_nested(column.type):
        return _encoded(column)
    if not pa.types.is_string(column.type):
        return column.cast(pa.string())
    if pc.any(pc.match_substring_regex(column, r'["\\\x00-\x1f]')).as_py():
        return _encoded(column)
    return pc.binary_join_element_wise('"', column, '"', "")


def _encoded(column: pa.Array) -> pa.Array:
    return pa.array([None if value is None else _encode(value) for value in column.to_pylist()], pa.string())


def _csv(column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):
        return _float_text(column)
    text = column.cast(pa.string())
    is_quoted = pc.match_substring_regex(text, '[",\r\n]')
    if not pc.any(is_quoted).as_py():
        return text
    return pc.if_else(is_quoted, pc.binary_join_element_wise('"', pc.replace_substring(text, '"', '""'), '"', ""), text)


def _float_text(column: pa.Array) -> pa.Array:
    """The shortest text that reads as the same float32. A whole number keeps its point: a reader that guesses a column's type
    from its first lines must not take it for an integer."""
    text = column.cast(pa.string())
    is_whole = pc.invert(pc.match_substring_regex(text, "[.e]"))
    return pc.if_else(is_whole, pc.binary_join_element_wise(text, ".0", ""), text)


class _Sink(io.RawIOBase):
    """Where pyarrow writes to: keeps what has not been taken, and counts all that was written."""

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
