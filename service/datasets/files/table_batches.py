"""Batches of the columns of a Parquet or Arrow file, from the isolated process that reads it, whose output is not trusted."""

import io
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import IO

import pyarrow as pa

from service.datasets.files.batches import Batch
from service.datasets.files.budget import Meter, invalid_file
from service.datasets.files.isolated import ReaderProblem, reading
from service.settings import UploadSettings


def table_batches(
    file: IO[bytes],
    task: str,
    kind: str,
    columns: Sequence[str] | None,
    names: list[str],
    meter: Meter,
    limits: UploadSettings,
) -> Generator[Batch]:
    """The batches of the file, which is read as the task says; `kind` is what messages call it.

    `names` is given the names of all columns that the file has. Only `columns` are read, where it has any of them.

    Raises:
        TooLarge: a budget is exceeded.
        Unprocessable: the file cannot be read.
    """
    done = 0
    with reading(task, file, limits, columns) as reader:
        try:
            for batch in _received(_Pipe(reader.output, meter), names):
                meter.check_rows(done + batch.columns.num_rows, "row")
                yield replace(batch, first=done + 1)
                meter.check_time()
                done += batch.columns.num_rows
            reader.check_end()
        except ReaderProblem as problem:
            raise invalid_file(f"The file cannot be read as {kind} after row {done}: {problem}") from None
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OSError,
        ) as error:
            # No stream of batches; where it breaks off, its end says why.
            reader.output.close()
            try:
                reader.check_end()
            except ReaderProblem as problem:
                raise invalid_file(f"The file cannot be read as {kind} after row {done}: {problem}") from None
            raise invalid_file(f"The file cannot be read as {kind} after row {done}: {error}") from error


class _Pipe(io.RawIOBase):
    """What the reader writes, within the budget; an announced length is never trusted."""

    def __init__(self, pipe: IO[bytes], meter: Meter) -> None:
        self._pipe, self._meter = pipe, meter

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self._meter.spend(size)
        return self._pipe.read(size)


def _received(pipe: _Pipe, names: list[str]) -> Iterator[Batch]:
    """The batches of the stream. Its writer may have been taken over by the file, so each is checked before it is used."""
    with pa.ipc.open_stream(pa.PythonFile(pipe, mode="r")) as stream:
        names.extend(map(str, json.loads((stream.schema.metadata or {}).get(b"names", b"[]"))))
        while True:
            try:
                batch, metadata = stream.read_next_batch_with_custom_metadata()
            except StopIteration:
                return
            batch.validate(full=True)
            told = metadata or {}
            if b"problem" in told:
                raise ReaderProblem(told[b"problem"].decode(errors="replace"))
            faults = json.loads(told[b"faults"])
            yield Batch(0, batch, {int(i): str(message) for i, message in faults.items()})
