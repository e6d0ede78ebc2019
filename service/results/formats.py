"""Encoders of exports: batches of columns in, bytes out, one batch in memory at a time."""

import csv
import io
import json
from collections.abc import Callable, Generator, Iterable
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# A batch of rows: column name -> values, all of one length. Every batch of an export has the same columns.
Columns = dict[str, list[Any]]
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


class Format(StrEnum):
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


MEDIA_TYPES = {
    Format.JSONL: "application/x-ndjson",
    Format.CSV: "text/csv; charset=utf-8",
    Format.PARQUET: "application/vnd.apache.parquet",
}


def jsonl(batches: Iterable[Columns]) -> ByteStream:
    """One JSON object a line."""
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
    for batch in batches:
        rows = (encode(dict(zip(batch, row, strict=True))) for row in zip(*batch.values(), strict=True))
        yield "".join(f"{row}\n" for row in rows).encode()


def comma_separated(batches: Iterable[Columns]) -> ByteStream:
    """RFC 4180 with a header; true and false in lower case, nothing where there is no value."""
    has_header = False
    for batch in batches:
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer)
        if not has_header:
            writer.writerow(batch)
            has_header = True
        columns = (["true" if v else "false" for v in c] if n in ("exact", "selected") else c for n, c in batch.items())
        writer.writerows(zip(*columns, strict=True))
        yield buffer.getvalue().encode()


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


def parquet(batches: Iterable[Columns]) -> ByteStream:
    """One row group a batch; `datasets.load_dataset("parquet", ...)` reads it."""
    sink = _Sink()
    writer: pq.ParquetWriter | None = None
    try:
        for batch in batches:
            schema = pa.schema([pa.field(name, _TYPES[name]) for name in batch])
            if writer is None:
                writer = pq.ParquetWriter(sink, schema, compression="zstd")
            writer.write_table(pa.table(batch, schema=schema))
            yield sink.take()
    finally:
        if writer is not None:
            writer.close()
    yield sink.take()


ENCODERS: dict[Format, Callable[[Iterable[Columns]], ByteStream]] = {
    Format.JSONL: jsonl,
    Format.CSV: comma_separated,
    Format.PARQUET: parquet,
}
