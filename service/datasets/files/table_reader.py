"""Reads Parquet and Arrow files, and unpacks zstd, in a separate process, since a file can be made to crash or fill its reader.

A page of kilobytes may decompress to gigabytes, a dictionary or a run of levels may repeat without end, the footer may lie
about each, and Arrow is native code. So this process runs isolated (`python -I`), without credentials, under limits on memory
and processor time; its parent checks what it writes and holds it to its budgets (`table_batches.py`, `sources.py`).

    stdin    the file, seekable
    argv     {"task": "parquet" | "arrow" | "arrow_stream" | "zstd", "columns": [...] or null for all, "memory_bytes": ...,
             "base_seconds": ..., "seconds_per_byte": ..., "max_bytes": ...}
    stdout   of zstd: the bytes.
             Of the others: an Arrow stream of batches of up to 4,096 rows, with those of the columns that the file has; all
             that it has where there are none of them. The metadata of the schema tell the names of all of them:
             {"names": [...]}. The metadata of a batch may name rows that cannot be read, which are null in it:
             {"faults": {"17": "contains ..."}}; that of the last one why the rest of the file cannot be read:
             {"problem": "..."}
    status   0 if that is all, ENOMEM if the memory did not suffice, EILSEQ if the zstd stream is corrupt or truncated; any
             other is a crash. SIGXCPU: it took too much time
"""

import errno
import json
import math
import mmap
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

# More would decode values that a dictionary repeats by the gigabyte; fewer cost time.
_READ_ROWS = 64
_SENT_ROWS, _SENT_BYTES = 4_096, 2**22


def _limit(kind: int, most: int, hardest: int | None = None) -> None:
    hard = resource.getrlimit(kind)[1]
    most, hardest = (limit if hard == resource.RLIM_INFINITY else min(limit, hard) for limit in (most, hardest or most))
    with suppress(ValueError, OSError):  # macOS has no limit on data
        resource.setrlimit(kind, (most, hardest))


class _Time:
    """The processor time that it may take: it grows with what has been written."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._base, self._per_byte = given["base_seconds"], given["seconds_per_byte"]
        self._base += self._per_byte * os.fstat(0).st_size
        self._most = math.ceil(self._base + self._per_byte * given["max_bytes"]) + 1
        self._bytes = 0
        self.grow(0)

    def grow(self, written: int) -> None:
        self._bytes += written
        _limit(resource.RLIMIT_CPU, math.ceil(self._base + self._per_byte * self._bytes), self._most)


def _plain(kind: Any) -> Any:
    """The type without dictionaries, views, 64-bit offsets, extensions and nanoseconds, which Python's times do not have."""
    import pyarrow as pa

    is_kind = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if is_kind.is_dictionary(kind):
        return _plain(kind.value_type)
    if is_kind.is_large_string(kind) or is_kind.is_string_view(kind):
        return pa.string()
    if any(is_list(kind) for is_list in (is_kind.is_list, is_kind.is_large_list, is_kind.is_list_view)):
        return pa.list_(_plain_field(kind.value_field))
    if is_kind.is_fixed_size_list(kind) or is_kind.is_large_list_view(kind):
        return pa.list_(_plain_field(kind.value_field))
    if is_kind.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    if is_kind.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    if is_kind.is_time64(kind):
        return pa.time64("us")
    if is_kind.is_duration(kind):
        return pa.duration("us")
    if is_kind.is_union(kind) or is_kind.is_run_end_encoded(kind):
        raise ValueError(
            f"it has a column of the type {kind}, which cannot be read; write it as a plain type, or leave it out"
        )
    return kind


def _plain_field(field: Any) -> Any:
    return field.with_type(_plain(field.type)).with_nullable(True).remove_metadata()


class _Parquet:
    """A Parquet file. `schema` is that of the whole file."""

    def __init__(self, file: IO[bytes]) -> None:
        import pyarrow.parquet as pq

        # Without pre-buffering and with a buffer, a column is read page by page instead of a row group at once.
        self._parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
        self.schema = self._parquet.schema_arrow

    def batches(self, wanted: list[str]) -> Iterator[Any]:
        total = 0
        for read in self._parquet.iter_batches(_READ_ROWS, columns=wanted, use_threads=False):
            total += read.num_rows
            yield read.select(wanted), {}
        declared = self._parquet.metadata.num_rows
        if total != declared:  # Arrow does not report pages that end too early
            raise ValueError(f"its footer declares {declared} rows, but it has {total}")


class _Arrow:
    """An Arrow file or stream (IPC). It is mapped, so that a large record batch does not have to fit the memory."""

    def __init__(self, file: IO[bytes], task: str) -> None:
        import pyarrow as pa

        self._bytes = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._open = pa.ipc.open_file if task == "arrow" else pa.ipc.open_stream
        self.schema = self._opened().schema

    def _opened(self, **options: Any) -> Any:
        import pyarrow as pa

        return self._open(pa.BufferReader(self._bytes), options=pa.ipc.IpcReadOptions(use_threads=False, **options))

    def _read(self, **options: Any) -> Iterator[Any]:
        reader = self._opened(**options)
        # Only a stream can be iterated; only a file says how many batches it has.
        is_file = hasattr(reader, "get_batch")
        return (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)

    def _is_mapped(self) -> bool:
        """Whether batches stay where they are in the file, as they do unless they are compressed."""
        try:
            first = next(self._read(), None)
        except MemoryError:
            return False
        buffers = [buffer for column in (first.columns if first else ()) for buffer in column.buffers() if buffer]
        end = self._bytes.address + self._bytes.size
        return all(self._bytes.address <= buffer.address < end for buffer in buffers)

    def batches(self, wanted: list[str]) -> Iterator[Any]:
        # To choose columns is to copy the whole batch first: worth it only where they have to be decompressed.
        chosen = [self.schema.get_field_index(name) for name in wanted]
        for each in self._read() if self._is_mapped() else self._read(included_fields=chosen):
            batch = each.select(wanted)
            faults = _unreadable(batch)  # before anything is done with offsets that may lie
            for start in range(0, batch.num_rows, _READ_ROWS):
                rows = range(start, min(start + _READ_ROWS, batch.num_rows))
                here = {i - start: faults[i] for i in rows if i in faults} if faults else {}
                piece = batch.slice(start, len(rows))
                yield (_without(piece, here) if here else piece), here


def _names(schema: Any, columns: list[str] | None) -> list[str]:
    """Of the columns that are wanted those that the file has, or all that it has."""
    names: list[str] = schema.names
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two of its columns have the same name, {json.dumps(twice)}")
    return [name for name in columns or () if name in names] or names


def _sent(read: Iterator[Any], schema: Any) -> Iterator[Any]:
    """The rows in batches that are worth sending, with their faults; bounded in bytes, for a row may have a megabyte."""
    import pyarrow as pa

    gathered: list[Any] = []
    faults: dict[int, str] = {}
    rows = size = 0
    for piece, bad in read:
        batch = _without_nan(piece.cast(schema, safe=False))
        gathered.append(batch)
        faults.update((rows + i, message) for i, message in bad.items())
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows + _READ_ROWS > _SENT_ROWS or size >= _SENT_BYTES:
            yield pa.concat_batches(gathered), faults
            gathered, faults, rows, size = [], {}, 0, 0
    if gathered:
        yield pa.concat_batches(gathered), faults


def _without_nan(batch: Any) -> Any:
    """Null for NaN in columns of numbers, which is how pandas writes an absent value of any column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for i, field in enumerate(batch.schema):
        if pa.types.is_floating(field.type):
            column = batch.column(i)
            batch = batch.set_column(i, field, pc.if_else(pc.is_nan(column), pa.scalar(None, field.type), column))
    return batch


def _unreadable(batch: Any) -> dict[int, str]:
    """What is wrong with rows whose values are not what their types promise, which Arrow checks only when it is asked to."""
    import pyarrow as pa

    def fault(row: Any) -> str | None:
        try:
            row.validate(full=True)
        except (pa.ArrowException, ValueError) as error:
            is_text = "UTF8" in str(error) or "UTF-8" in str(error)
            return "contains a string that is not UTF-8" if is_text else f"contains an unreadable value: {error}"
        return None

    if fault(batch) is None:
        return {}
    found = {i: fault(batch.slice(i, 1)) for i in range(batch.num_rows)}
    return {i: message for i, message in found.items() if message is not None}


def _without(batch: Any, faults: dict[int, str]) -> Any:
    """The batch with nulls in place of the rows that have faults."""
    import pyarrow as pa

    return batch.take(pa.array([None if i in faults else i for i in range(batch.num_rows)], pa.int32()))


def _write_table(file: IO[bytes], out: IO[bytes], task: str, columns: list[str] | None, time: _Time) -> None:
    import pyarrow as pa

    pa.set_cpu_count(1)
    problem, writer, schema = "", None, pa.schema([])
    try:
        table = _Parquet(file) if task == "parquet" else _Arrow(file, task)
        wanted = _names(table.schema, columns)
        names = {"names": json.dumps(table.schema.names)}
        schema = pa.schema([_plain_field(table.schema.field(name)) for name in wanted], metadata=names)
        writer = pa.ipc.new_stream(out, schema)
        for batch, faults in _sent(table.batches(wanted), schema):
            found = {**_unreadable(batch), **faults}
            good = _without(batch, found) if found else batch
            writer.write_batch(good, custom_metadata={"faults": json.dumps(found)})
            time.grow(good.nbytes)
    except (MemoryError, BrokenPipeError):
        raise
    except RecursionError:
        problem = "it is nested too deeply"
    except (pa.ArrowException, OSError, ValueError) as error:
        problem = str(error)
    if problem:
        writer = writer or pa.ipc.new_stream(out, schema)
        nothing = pa.RecordBatch.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema)
        writer.write_batch(nothing, custom_metadata={"problem": problem.encode(errors="replace")})
    if writer is not None:
        writer.close()


def _unpack(file: IO[bytes], out: IO[bytes], time: _Time) -> int:
    """Writes what the zstd stream holds; a frame may ask for a window of up to 128 MiB, zstd's own default."""
    import pyarrow as pa

    file.seek(0)
    try:
        with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd") as stream:
            while piece := stream.read(2**18):
                out.write(piece)
                time.grow(len(piece))
    except BrokenPipeError:
        raise
    except OSError as error:
        return errno.ENOMEM if "memory" in str(error) else errno.EILSEQ
    return 0


def main() -> None:
    given = json.loads(sys.argv[1])
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_DATA, given["memory_bytes"])
    status = 0
    try:
        with open(0, "rb", buffering=0) as file, open(1, "wb", buffering=2**16) as out:
            time = _Time(given)
            if given["task"] == "zstd":
                status = _unpack(file, out, time)
            else:
                _write_table(file, out, given["task"], given["columns"], time)
    except MemoryError:
        status = errno.ENOMEM
    except BrokenPipeError:  # the parent has stopped reading
        pass
    os._exit(status)  # an ordinary exit might need memory


if __name__ == "__main__":
    main()
