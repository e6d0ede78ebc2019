"""Writes the rows of a Parquet file as JSONL: a process of its own, since a file can be made to break or fill whoever reads it.

A page of kilobytes may decompress to gigabytes, a dictionary or a run of levels may repeat without end, the footer may lie
about each, and Arrow is native code. So this process is run isolated (`python -I`), without credentials, under limits on memory
and processor time; whoever started it holds what it writes to the same budgets as any JSONL (`service.datasets.reader`).

    stdin    the file, seekable
    argv     {"columns": [...], "memory_bytes": ..., "cpu_seconds": ...}
    stdout   a line for each row: its object, or a string that says why it cannot be read; at last, where the file cannot be
             read on, a list with the reason
    status   0 where all is told, ENOMEM where the memory did not suffice; any other is a death
"""

import errno
import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

# More would decode values that a dictionary repeats by the gigabyte; fewer cost time.
_BATCH_ROWS = 64


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with suppress(ValueError, OSError):  # macOS has no limit on data
        resource.setrlimit(kind, (most, most))


def _batches(file: IO[bytes], columns: list[str]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    # Without pre-buffering and with a buffer, a column is read page by page instead of a row group at once.
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as parquet:
        names = parquet.schema_arrow.names
        wanted = [name for name in columns if name in names]
        if not set(wanted) - {"id", "source"}:
            raise ValueError(f"it has none of the columns that hold content: {', '.join(columns[2:])}")
        if len(names) != len(set(names)):
            raise ValueError("two of its columns have one name")
        rows = 0
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=wanted, use_threads=False):
            rows += batch.num_rows
            yield batch
        if rows != parquet.metadata.num_rows:  # Arrow itself says nothing of pages that end too early
            raise ValueError(f"its footer tells of {parquet.metadata.num_rows} rows, and it has {rows}")


def _rows(batch: Any) -> list[dict[str, Any] | str]:
    try:
        rows: list[dict[str, Any] | str] = batch.to_pylist()
    except (ValueError, OverflowError):  # of one row; all of them are decoded again to find it
        return [_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
    return rows


def _row(row: Any) -> dict[str, Any] | str:
    try:
        fields: dict[str, Any] = row.to_pylist()[0]
    except UnicodeDecodeError:
        return "holds a string that is not UTF-8"
    except (ValueError, OverflowError) as error:
        return f"holds a value that cannot be read: {error}"
    return fields


# What JSON has no form for can be no content; as an object it is refused where it matters and passed over elsewhere.
_encode = json.JSONEncoder(default=lambda _: {}, ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


def _write(out: IO[bytes], columns: list[str]) -> None:
    import pyarrow as pa

    pa.set_cpu_count(1)
    problem = ""
    try:
        with open(0, "rb", buffering=0) as file:
            for batch in _batches(file, columns):
                for row in _rows(batch):
                    out.write(_encode(row).encode() + b"\n")
    except (MemoryError, BrokenPipeError):
        raise
    except RecursionError:
        problem = "it is nested too deeply"
    except (pa.ArrowException, OSError, ValueError) as error:
        problem = str(error)
    if problem:
        out.write(_encode([problem]).encode(errors="replace") + b"\n")
    out.flush()


def main() -> None:
    given = json.loads(sys.argv[1])
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_DATA, given["memory_bytes"])
    _limit(resource.RLIMIT_CPU, given["cpu_seconds"])
    status = 0
    try:
        with open(1, "wb", buffering=2**16) as out:
            _write(out, given["columns"])
    except MemoryError:
        status = errno.ENOMEM
    except BrokenPipeError:  # nobody wants the rest
        pass
    os._exit(status)  # nothing is left to do that would need memory


if __name__ == "__main__":
    main()
