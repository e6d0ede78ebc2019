"""Checksums of an artifact, one for each MiB, so that a reader checks what it reads and no more, in the memory of one block.

The record, in the file `<artifact>.sum`, is an array of little-endian uint64: size and block size in bytes, XXH3-64 of each
block, and XXH3-64 of all that before it. Why not another hash: docs/decisions/0015-artifact-integrity.md.
"""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NoReturn, Self

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

SUFFIX = ".sum"
_BLOCK_BYTES = 2**20


class ArtifactDamaged(Exception):
    """The bytes of the artifact `key` are not those that were written; `reason` says where."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


@dataclass(frozen=True, slots=True)
class Checksums:
    """`blocks`, uint64 (b,): the hash of each block; the last one may be shorter."""

    size: int
    block_bytes: int
    blocks: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, file: IO[bytes]) -> Self:
        """Reads the open file to its end."""
        hashes = []
        size = 0
        while block := file.read(_BLOCK_BYTES):
            hashes.append(xxh3_64_intdigest(block))
            size += len(block)
        return cls(size, _BLOCK_BYTES, np.array(hashes, "<u8"))

    @classmethod
    def parse(cls, record: bytes) -> Self:
        """Raises ValueError if the record itself is damaged."""
        head, tail = record[:-8], record[-8:]
        if len(record) < 24 or len(record) % 8 or int.from_bytes(tail, "little") != xxh3_64_intdigest(head):
            raise ValueError("its checksums are damaged")
        size, block_bytes, *_ = (int(value) for value in np.frombuffer(head[:16], "<u8"))
        return cls(size, block_bytes, np.frombuffer(head[16:], "<u8"))

    def record(self) -> bytes:
        head = np.array([self.size, self.block_bytes], "<u8").tobytes() + self.blocks.tobytes()
        return head + xxh3_64_intdigest(head).to_bytes(8, "little")

    @property
    def digest(self) -> str:
        """One for the whole artifact: XXH3-64 of the record, in hexadecimal."""
        return xxh3_64_hexdigest(self.record())


class CheckedFile(io.RawIOBase):
    """An open file, of which no byte is returned that does not have its checksum: `refuse` gets the reason, and raises."""

    def __init__(self, file: IO[bytes], sums: Checksums, refuse: Callable[[str], NoReturn]) -> None:
        self._file, self.sums, self._refuse = file, sums, refuse
        self._position = 0
        self._number, self._block = -1, b""
        size = file.seek(0, os.SEEK_END)
        if size != sums.size:
            refuse(f"it has {size:,} bytes, and {sums.size:,} were written")

    def check(self) -> None:
        """Reads the whole file."""
        for number in range(len(self.sums.blocks)):
            self._checked(number)

    def _checked(self, number: int) -> bytes:
        self._file.seek(number * self.sums.block_bytes)
        block = b"".join(_parts(self._file, self.sums.block_bytes))
        if xxh3_64_intdigest(block) != self.sums.blocks[number]:
            start = number * self.sums.block_bytes
            self._refuse(f"bytes {start:,} to {start + len(block) - 1:,} are not those that were written")
        return block

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.sums.size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self.sums.size:
            return 0
        number, start = divmod(self._position, self.sums.block_bytes)
        if number != self._number:
            self._block, self._number = self._checked(number), number
        part = memoryview(self._block)[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
        super().close()


def _parts(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The next `size` bytes, or those up to the end; a read may return fewer than it was asked for."""
    while size and (part := file.read(size)):
        yield part
        size -= len(part)
