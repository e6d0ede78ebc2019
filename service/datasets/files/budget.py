"""What an upload may cost: bytes, rows and processor time, in proportion to the file that was sent."""

import os
import time
from typing import IO

from service.datasets.values import InvalidRow
from service.http.errors import TooLarge, Unprocessable
from service.settings import UploadSettings


def invalid_file(detail: str) -> Unprocessable:
    return Unprocessable(detail, code="invalid_file")


def too_long(max_row_bytes: int) -> InvalidRow:
    return InvalidRow(f"is longer than {max_row_bytes:,} bytes")


def too_costly() -> TooLarge:
    return TooLarge(
        "Reading the upload takes more processor time than its size allows for; send plain rows, with fewer and simpler columns,"
        " or as JSONL",
        code="upload_too_costly",
    )


class Meter:
    """Counts what was read or decoded and the time that it took, and raises when a budget is exceeded.

    The time is that of the thread, so it includes what becomes of the rows, and leaves out what other requests cost.
    """

    def __init__(self, file: IO[bytes], limits: UploadSettings) -> None:
        self._limits = limits
        self._file_bytes = os.fstat(file.fileno()).st_size
        self._most = max(limits.free_expansion_bytes, int(limits.max_expansion * self._file_bytes))
        self.bytes = 0  # read or decoded so far
        self._started = time.thread_time()

    def spend(self, n: int) -> None:
        self.bytes += n
        if self.bytes > self._most:
            raise TooLarge(
                f"The upload of {self._file_bytes:,} bytes is larger than {self._most:,} bytes after decompression, more than any"
                " ordinary file; send it less compressed, or as JSONL",
                code="upload_too_large",
            )
        if self.bytes > self._limits.max_bytes:
            raise TooLarge(
                f"The upload is larger than {self._limits.max_bytes:,} bytes after decompression; split it",
                code="upload_too_large",
            )

    def check_time(self) -> None:
        seconds = time.thread_time() - self._started
        if seconds > self._limits.base_seconds + self._limits.seconds_per_mib * (self._file_bytes + self.bytes) / 2**20:
            raise too_costly()

    def check_rows(self, rows: int, unit: str) -> None:
        if rows > self._limits.max_rows:
            raise TooLarge(
                f"The upload has more than {self._limits.max_rows:,} {unit}s; split it", code="upload_too_large"
            )
