"""Starts the isolated process that reads what native code decodes (`table_reader.py`), and says how it ended."""

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from service.datasets.files.budget import too_costly
from service.http.errors import TooLarge
from service.settings import UploadSettings

_READER = Path(__file__).with_name("table_reader.py")
# Nothing of our environment, so no credentials. Arrow's own allocator would reserve more memory than it uses.
_ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
_OUT_OF_MEMORY = (
    "Reading the file takes too much memory, if it is not corrupt; write it with smaller pages, row groups and record batches"
    " (zstd: without --long or --ultra), or as JSONL"
)


class ReaderProblem(Exception):
    """The isolated process cannot go on; the message says why."""


class Isolated:
    """The process; `output` is what it writes."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        self._process, self.output = process, process.stdout

    def check_end(self) -> None:
        """Waits for its end.

        Raises:
            TooLarge: its memory or its time did not suffice.
            ReaderProblem: it crashed, or says that it cannot read on.
        """
        status = self._process.wait()
        if status in (errno.ENOMEM, -signal.SIGABRT):  # Arrow aborts where it cannot report it
            raise TooLarge(_OUT_OF_MEMORY, code="upload_too_large")
        if status == -signal.SIGXCPU:
            raise too_costly()
        if status == errno.EILSEQ:
            raise ReaderProblem("it is corrupt or truncated")
        if status != 0:
            end = f"signal {-status}" if status < 0 else f"status {status}"
            raise ReaderProblem(f"reading it crashed the reader ({end}): the file is corrupt or malicious")


@contextmanager
def reading(
    task: str, file: IO[bytes], limits: UploadSettings, columns: Sequence[str] | None = None
) -> Iterator[Isolated]:
    """The process that does the task with the file, until the context ends."""
    given = {
        "task": task,
        "columns": columns,
        "memory_bytes": limits.parquet_memory_bytes,
        "base_seconds": limits.base_seconds,
        "seconds_per_byte": limits.seconds_per_mib / 2**20,
        "max_bytes": limits.max_bytes,
    }
    command = [sys.executable, "-I", str(_READER), json.dumps(given)]
    with subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, env=_ENVIRONMENT) as process:
        try:
            yield Isolated(process)
        finally:
            process.kill()
