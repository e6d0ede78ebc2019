"""Streams the rows of an upload: JSONL, gzipped JSONL or Parquet, told apart by their first bytes, under fixed budgets.

A small file can expand without end (gzip a thousandfold, Parquet's dictionaries far more), so nothing is decoded whole: lines
are read under a limit, and Parquet by a process of its own that turns it into lines (`service.datasets.parquet_reader`).
"""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal

from service.datasets.formats import InvalidRow
from service.errors import TooLarge, Unprocessable
from service.settings import UploadSettings

_GZIP, _PARQUET, _BYTE_ORDER_MARK = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"
_PARQUET_READER = Path(__file__).with_name("parquet_reader.py")
# As little as a process needs: no credential of ours. Arrow's own allocator would set aside more than it uses.
_READER_ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
_MEMORY_SPENT = (
    "The Parquet file takes too much memory to read; write it with smaller pages and row groups, or as JSONL"
)
_SLOWEST_BYTES = 2**22  # that the reader may take a second of processor time for

# A row's number from 1, blank lines counted, and its fields or what is wrong with it.
NumberedRow = tuple[int, dict[str, Any] | InvalidRow]


@dataclass(frozen=True, slots=True)
class Upload:
    """`unit` is what the numbers of `rows` count."""

    unit: Literal["line", "row"]
    rows: Generator[NumberedRow]


def open_upload(file: IO[bytes], columns: tuple[str, ...], limits: UploadSettings) -> Upload:
    """The rows of a file of the file system, streamed; only `columns` are read where the format allows for it.

    Raises (also while the rows are read):
        TooLarge: a budget is spent.
        Unprocessable: the file as a whole cannot be read.
    """
    file.seek(0)
    magic = os.pread(file.fileno(), 4, 0)  # past the buffer: another process moves the position of the file
    if magic == _PARQUET:
        return Upload("row", _parquet_rows(file, columns, limits))
    if magic.startswith(_GZIP):
        return Upload("line", _gzip_rows(file, limits))
    return Upload("line", _lines(file, limits, "line", _json_object))


def invalid_file(detail: str) -> Unprocessable:
    return Unprocessable(detail, code="invalid_file")


class _Meter:
    """Counts what was read or decoded, and stops when it is more than the budget."""

    def __init__(self, limits: UploadSettings) -> None:
        self._limits = limits
        self._bytes = 0

    def spend(self, n: int) -> None:
        self._bytes += n
        if self._bytes > self._limits.max_bytes:
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


def _gzip_rows(file: IO[bytes], limits: UploadSettings) -> Generator[NumberedRow]:
    number = 0
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as stream:
            for number, row in _lines(stream, limits, "line", _json_object):
                yield number, row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise invalid_file(f"The gzip stream is damaged or cut off after line {number}: {error}") from error


def _lines(
    stream: IO[bytes] | gzip.GzipFile,
    limits: UploadSettings,
    unit: str,
    read: Callable[[bytes], dict[str, Any] | InvalidRow | None],
) -> Generator[NumberedRow]:
    """The rows of JSONL; `read` makes a row of a line that is not blank, or None where it is to be passed over."""
    meter = _Meter(limits)
    for number in count(1):
        line = stream.readline(limits.max_row_bytes + 1)
        if not line:
            return
        # Blank lines count as well: gigabytes of newlines would keep the parser busy for an hour.
        meter.check_rows(number, unit)
        meter.spend(len(line))
        if len(line) > limits.max_row_bytes and not line.endswith(b"\n"):
            _skip_line(stream, meter)
            yield number, _row_too_long(limits)
            continue
        line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if not line.isspace() and line and (row := read(line)) is not None:
            yield number, row


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


def _parquet_rows(file: IO[bytes], columns: tuple[str, ...], limits: UploadSettings) -> Generator[NumberedRow]:
    seconds = 60 + limits.max_bytes // _SLOWEST_BYTES
    given = {"columns": columns, "memory_bytes": limits.parquet_memory_bytes, "cpu_seconds": seconds}
    command = [sys.executable, "-I", str(_PARQUET_READER), json.dumps(given)]
    done = 0
    with subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, env=_READER_ENVIRONMENT) as reader:
        assert reader.stdout is not None
        try:
            for done, row in _lines(reader.stdout, limits, "row", _told):
                yield done, row
            if reader.wait() in (errno.ENOMEM, -signal.SIGABRT):  # Arrow ends by it where it cannot say so
                raise TooLarge(_MEMORY_SPENT, code="upload_too_large")
            if reader.returncode != 0:
                end = f"signal {-reader.returncode}" if reader.returncode < 0 else f"status {reader.returncode}"
                raise _ReaderProblem(f"it ended the process that read it ({end}): it is damaged, or made to do so")
        except _ReaderProblem as problem:
            raise invalid_file(f"The file cannot be read as Parquet after row {done}: {problem}") from None
        finally:
            reader.kill()


class _ReaderProblem(Exception):
    """Why the file cannot be read on."""


def _told(line: bytes) -> dict[str, Any] | InvalidRow | None:
    """What a line of the Parquet reader says."""
    if not line.endswith(b"\n"):
        return None  # it died while it wrote; its status says so
    try:
        value = json.loads(line)
    except RecursionError:
        return InvalidRow("is nested too deeply")
    if isinstance(value, list):
        raise _ReaderProblem(*value)
    return InvalidRow(value) if isinstance(value, str) else value
