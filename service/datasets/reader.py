"""Streams the rows of an upload: JSONL, gzipped JSONL or Parquet, told apart by their first bytes, under fixed budgets.

A small file can expand without end (gzip a thousandfold, Parquet's dictionaries far more), so nothing is decoded whole: lines
are read under a limit, Parquet in batches so small that even the largest value its footer allows for cannot fill the memory.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from service.datasets.formats import InvalidRow
from service.errors import TooLarge, Unprocessable
from service.settings import UploadSettings

_GZIP, _PARQUET, _BYTE_ORDER_MARK = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"
_BATCH_ROWS = 1024
_BATCH_BYTES = 256 * 2**20

# A row's number from 1, blank lines counted, and its fields or what is wrong with it.
NumberedRow = tuple[int, dict[str, Any] | InvalidRow]


@dataclass(frozen=True, slots=True)
class Upload:
    """`unit` is what the numbers of `rows` count."""

    unit: Literal["line", "row"]
    rows: Iterator[NumberedRow]


def open_upload(file: IO[bytes], columns: tuple[str, ...], limits: UploadSettings) -> Upload:
    """The rows of a seekable file, streamed; only `columns` are read where the format allows for it.

    Raises (also while the rows are read):
        TooLarge: a budget is spent.
        Unprocessable: the file as a whole cannot be read.
    """
    file.seek(0)
    magic = file.read(4)
    file.seek(0)
    if magic == _PARQUET:
        return Upload("row", _parquet_rows(file, columns, limits))
    if magic.startswith(_GZIP):
        return Upload("line", _gzip_rows(file, limits))
    return Upload("line", _json_rows(file, limits))


def invalid_file(detail: str) -> Unprocessable:
    return Unprocessable(detail, code="invalid_file")


class _Meter:
    """Counts what was read or decoded, and stops when it is more than the budget."""

    def __init__(self, limits: UploadSettings) -> None:
        self._limits = limits
        self._bytes = 0

    def spend(self, n: int) -> None:
        self._bytes += n
        self.check_bytes(self._bytes)

    def check_bytes(self, n: int) -> None:
        if n > self._limits.max_bytes:
            raise TooLarge(
                f"The upload is larger than {self._limits.max_bytes:,} bytes once decompressed; split it",
                code="upload_too_large",
            )

    def check_rows(self, rows: int, unit: str) -> None:
        if rows > self._limits.max_rows:
            raise TooLarge(
                f"The upload has more than {self._limits.max_rows:,} {unit}s; split it", code="upload_too_large"
            )


def _row_too_long(limits: UploadSettings) -> InvalidRow:
    return InvalidRow(f"is longer than {limits.max_row_bytes:,} bytes")


def _gzip_rows(file: IO[bytes], limits: UploadSettings) -> Iterator[NumberedRow]:
    number = 0
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as stream:
            for number, row in _json_rows(stream, limits):
                yield number, row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise invalid_file(f"The gzip stream is damaged or cut off after line {number}: {error}") from error


def _json_rows(stream: IO[bytes] | gzip.GzipFile, limits: UploadSettings) -> Iterator[NumberedRow]:
    meter = _Meter(limits)
    for number in count(1):
        line = stream.readline(limits.max_row_bytes + 1)
        if not line:
            return
        # Blank lines count as well: gigabytes of newlines would keep the parser busy for an hour.
        meter.check_rows(number, "line")
        meter.spend(len(line))
        if len(line) > limits.max_row_bytes and not line.endswith(b"\n"):
            _skip_line(stream, meter)
            yield number, _row_too_long(limits)
            continue
        line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if not line.isspace() and line:
            yield number, _json_object(line)


def _skip_line(stream: IO[bytes] | gzip.GzipFile, meter: _Meter) -> None:
    rest = b"-"
    while rest and not rest.endswith(b"\n"):
        rest = stream.readline(2**16)
        meter.spend(len(rest))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value; write null")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _json_object(line: bytes) -> dict[str, Any] | InvalidRow:
    try:
        value = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return InvalidRow(f"is not UTF-8 at byte {error.start + 1}; uploads are JSONL, gzipped JSONL or Parquet")
    except json.JSONDecodeError as error:
        return InvalidRow(f"is not JSON: {error.msg} at column {error.colno}; each line must be one JSON object")
    except RecursionError:
        return InvalidRow("is nested too deeply")
    except ValueError as error:  # NaN, or an integer of thousands of digits
        return InvalidRow(f"is not JSON that can be read: {error}")
    return value if isinstance(value, dict) else InvalidRow("is not a JSON object; each line must be one JSON object")


def _parquet_rows(file: IO[bytes], columns: tuple[str, ...], limits: UploadSettings) -> Iterator[NumberedRow]:
    meter, done = _Meter(limits), 0
    try:
        # Without pre-buffering and with a buffer, a column is read page by page instead of a row group at once.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as parquet:
            meter.check_rows(parquet.metadata.num_rows, "row")
            schema = _schema(parquet, columns)
            sizes = _column_sizes(parquet.metadata, schema.names)
            meter.check_bytes(sum(map(sum, sizes)))
            for group, group_sizes in enumerate(sizes):
                # A dictionary lets one value as large as the whole column repeat in every row: assume that it does.
                batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, *group_sizes)))
                for stored in parquet.iter_batches(batch_rows, [group], schema.names, use_threads=False):
                    batch = stored.select(schema.names).cast(schema)
                    meter.spend(batch.nbytes)
                    meter.check_rows(done + batch.num_rows, "row")
                    for row in _decoded(batch, limits):
                        done += 1
                        yield done, row
    except (pa.ArrowException, OSError) as error:
        raise invalid_file(f"The file cannot be read as Parquet after row {done}: {error}") from error


def _schema(parquet: pq.ParquetFile, columns: tuple[str, ...]) -> pa.Schema:
    """The columns to read, with plain types."""
    schema = parquet.schema_arrow
    wanted = [name for name in columns if name in schema.names]
    if not set(wanted) - {"id", "source"}:
        raise invalid_file(f"The Parquet file has none of the columns that hold content: {', '.join(columns[2:])}")
    return pa.schema([pa.field(name, _plain_type(schema.field(name).type)) for name in wanted])


def _column_sizes(metadata: pq.FileMetaData, wanted: list[str]) -> list[list[int]]:
    """For each row group, the decompressed bytes of each wanted column, as the footer has them."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [[group.column(i) for i in range(group.num_columns)] for group in groups]
    return [[c.total_uncompressed_size for c in cs if c.path_in_schema.split(".")[0] in wanted] for cs in chunks]


def _plain_type(type: pa.DataType) -> pa.DataType:
    """The type with categories written out: what a row takes is then its own size and not hidden in a dictionary."""
    if pa.types.is_dictionary(type):
        return _plain_type(type.value_type)
    if pa.types.is_list(type) or pa.types.is_large_list(type):
        return pa.list_(_plain_type(type.value_type))
    if pa.types.is_struct(type):
        return pa.struct([pa.field(field.name, _plain_type(field.type)) for field in type])
    if pa.types.is_nested(type) or isinstance(type, pa.BaseExtensionType):
        raise invalid_file(f"The Parquet file has a column of type {type}; write plain strings, lists and structs")
    return type


def _decoded(batch: pa.RecordBatch, limits: UploadSettings) -> list[dict[str, Any] | InvalidRow]:
    if batch.nbytes <= limits.max_row_bytes:
        with suppress(ValueError, OverflowError):  # a value that cannot be decoded; below, its row is found
            rows: list[dict[str, Any] | InvalidRow] = batch.to_pylist()
            return rows
    return [_decoded_row(batch.slice(i, 1), limits) for i in range(batch.num_rows)]


def _decoded_row(row: pa.RecordBatch, limits: UploadSettings) -> dict[str, Any] | InvalidRow:
    if row.nbytes > limits.max_row_bytes:
        return _row_too_long(limits)
    try:
        fields: dict[str, Any] = row.to_pylist()[0]
    except UnicodeDecodeError:
        return InvalidRow("holds a string that is not UTF-8")
    except (ValueError, OverflowError) as error:
        return InvalidRow(f"holds a value that cannot be read: {error}")
    return fields
