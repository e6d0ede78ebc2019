"""The bytes of an upload after decompression, under its budgets: as they are, from gzip, or from zstd.

Gzip is read by the standard library, whose window is 32 KiB. A zstd frame may ask for a window of up to 128 MiB, so its
unpacking is the isolated process's, under a limit on memory; only what it writes is seen here.
"""

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import IO, Literal, Protocol

from service.datasets.files.budget import Meter, invalid_file
from service.datasets.files.isolated import Isolated, ReaderProblem, reading
from service.settings import UploadSettings

Compression = Literal["gzip", "zstd"]

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)  # frames without content, with which parallel packers begin
_CORRUPT = (gzip.BadGzipFile, EOFError, zlib.error)
_LOOK_READS, _LOOK_BYTES = 256, 2**14  # how often the time is looked at, and of which reads each time
_COPY_BYTES = 2**20


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def readline(self, size: int, /) -> bytes: ...


class Damaged(Exception):
    """The compressed stream is corrupt or truncated; the message says how."""


def compression_of(head: bytes) -> Compression | None:
    """What the first bytes of a file say that it is packed with."""
    if head.startswith(_GZIP):
        return "gzip"
    if head.startswith(_ZSTD) or int.from_bytes(head[:4], "little") in _SKIPPABLE:
        return "zstd"
    return None


class Source:
    """Reads that are counted: what they give is spent, and the time looked at.

    Raises, wherever it reads:
        TooLarge: a budget is exceeded.
        Damaged: the compressed stream cannot be read on.
    """

    def __init__(self, stream: _Stream, meter: Meter, isolated: Isolated | None = None) -> None:
        self.meter = meter
        self._stream, self._isolated = stream, isolated
        self._reads = 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end only."""
        try:
            return self._counted(self._stream.read(size))
        except _CORRUPT as error:
            raise Damaged(str(error)) from error

    def readline(self, limit: int) -> bytes:
        """A line with its end, or `limit` bytes of it; nothing at the end."""
        try:
            return self._counted(self._stream.readline(limit))
        except _CORRUPT as error:
            raise Damaged(str(error)) from error

    def _counted(self, data: bytes) -> bytes:
        self.meter.spend(len(data))
        self._reads += 1
        if self._reads % _LOOK_READS == 0 or len(data) >= _LOOK_BYTES:
            self.meter.check_time()
        if not data and self._isolated is not None:
            self._check_end(self._isolated)
        return data

    def _check_end(self, isolated: Isolated) -> None:
        self._isolated = None
        try:
            isolated.check_end()
        except ReaderProblem as problem:
            raise Damaged(str(problem)) from None


@contextmanager
def opened(file: IO[bytes], compression: Compression | None, meter: Meter, limits: UploadSettings) -> Iterator[Source]:
    """The bytes of the file from its start; the file must not be read otherwise meanwhile."""
    if compression == "zstd":
        with reading("zstd", file, limits) as isolated:
            yield Source(isolated.output, meter, isolated)
        return
    file.seek(0)
    if compression is None:
        yield Source(file, meter)
        return
    with gzip.GzipFile(fileobj=file, mode="rb") as stream:
        yield Source(stream, meter)


@contextmanager
def unpacked(
    file: IO[bytes], compression: Compression | None, meter: Meter, limits: UploadSettings
) -> Iterator[IO[bytes]]:
    """A file of the bytes, for readers that must seek: the same one if it is not compressed, else a temporary one."""
    if compression is None:
        yield file
        return
    with TemporaryFile(prefix="winnow-") as whole:
        try:
            with opened(file, compression, meter, limits) as source:
                while piece := source.read(_COPY_BYTES):
                    whole.write(piece)
        except Damaged as damage:
            raise invalid_file(f"The {compression} stream is corrupt or truncated: {damage}") from damage
        whole.flush()
        yield whole


def head_of(file: IO[bytes], size: int) -> bytes:
    """The first bytes, past the buffer: another process may move the position of the file."""
    file.seek(0)  # what is still to be written is
    return os.pread(file.fileno(), size, 0)
