"""Renders the rows of an upload with the caller's template, in an isolated process (`template_process.py`)."""

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date, time
from itertools import islice
from pathlib import Path
from threading import Timer
from typing import Any

from service.datasets.files.batches import Batch, NumberedRow, each_row
from service.datasets.rows.template import PARTS, Rendered, RowTemplate
from service.datasets.values import InvalidRow, is_absent
from service.http.errors import TooLarge, Unprocessable
from service.settings import UploadSettings

RenderedRow = tuple[int, Rendered | InvalidRow]

_PROCESS = Path(__file__).with_name("template_process.py")
_CHUNK_ROWS, _CHUNK_BYTES = 256, 2**20
_ESCAPED_BYTES = 6  # what JSON may make of a character
_LEFTOVER = 2**16
_END_SECONDS = 5
# By the clock, a multiple of what a chunk may take of the processor: a process that was taken over might wait for ever.
_PATIENCE = 6


def rendered(
    parts: Iterable[NumberedRow | Batch], template: RowTemplate, limits: UploadSettings
) -> Generator[RenderedRow]:
    """Each row with what the template makes of it, or what is wrong with it.

    Raises:
        Unprocessable: the template cannot be compiled, or crashed the process.
        TooLarge: it takes too much time or memory.
    """
    with _renderer(template, limits) as renderer:
        rows = each_row(parts, limits.max_row_bytes)
        while chunk := list(_chunk(rows, template)):
            with renderer.ended_if_late(chunk):
                yield from renderer.rendered(chunk)


def _chunk(rows: Iterator[NumberedRow], template: RowTemplate) -> Iterator[tuple[NumberedRow, bytes | None]]:
    """The next rows, each with the JSON of what the template reads; none for a row that is invalid already."""
    size = 0
    for number, row in islice(rows, _CHUNK_ROWS):
        line = None if isinstance(row, InvalidRow) else _read_by(template, row)
        yield (number, row), line
        size += len(line or b"")
        if size >= _CHUNK_BYTES:
            return


def _read_by(template: RowTemplate, row: Mapping[str, Any]) -> bytes:
    read = {
        name: value
        for name, value in row.items()
        if not is_absent(value) and (template.takes_all or name in template.names)
    }
    return json.dumps(read, default=_plain).encode() + b"\n"


def _plain(value: object) -> str | None:
    """What JSON has no value for: dates and decimal numbers as text, bytes as null."""
    if isinstance(value, date | time):
        return value.isoformat()
    return None if isinstance(value, bytes | bytearray) else str(value)


class _Renderer:
    """The process; it answers each chunk of rows."""

    def __init__(self, process: "subprocess.Popen[bytes]", limits: UploadSettings) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._given, self._answers = process, process.stdin, process.stdout
        self._patience = _PATIENCE * limits.base_seconds
        self._patience_per_byte = _PATIENCE * limits.seconds_per_mib / 2**20
        self._limits, self._read, self._made, self._is_late = limits, 0, 0, False
        self._longest = _ESCAPED_BYTES * limits.max_row_bytes + _LEFTOVER

    @contextmanager
    def ended_if_late(self, chunk: list[tuple[NumberedRow, bytes | None]]) -> Iterator[None]:
        size = sum(len(line or b"") for _, line in chunk)
        clock = Timer(self._patience + self._patience_per_byte * size, self._end_late)
        clock.start()
        try:
            yield
        finally:
            clock.cancel()
            clock.join()

    def _end_late(self) -> None:
        self._is_late = True
        self._process.kill()

    def start(self, template: RowTemplate, limits: UploadSettings) -> None:
        sources = {part: getattr(template, part) for part in PARTS if getattr(template, part) is not None}
        given = {
            "templates": sources,
            "memory_bytes": limits.parquet_memory_bytes,
            "base_seconds": limits.base_seconds,
            "seconds_per_byte": limits.seconds_per_mib / 2**20,
            "max_bytes": limits.max_bytes,
            "max_row_bytes": limits.max_row_bytes,
        }
        self._send([json.dumps(given).encode() + b"\n"])
        if problem := self._answer().get("problem"):
            raise Unprocessable(f"template: {problem}", param="template")

    def rendered(self, chunk: list[tuple[NumberedRow, bytes | None]]) -> Iterator[RenderedRow]:
        lines = [line for _, line in chunk if line is not None]
        self._read += sum(map(len, lines))
        self._send([b"%d\n" % len(lines), *lines])
        for (number, row), line in chunk:
            if line is None or isinstance(row, InvalidRow):
                assert isinstance(row, InvalidRow)
                yield number, row
                continue
            answer = self._answer()
            if "error" in answer:
                yield number, InvalidRow(f"cannot be rendered: {answer['error']}")
            else:
                made = {part: answer.get(part, "") for part in PARTS}
                self._spend(sum(map(len, made.values())))
                yield number, Rendered(row, **made)

    def _spend(self, made: int) -> None:
        self._made += made
        most = max(self._limits.free_expansion_bytes, int(self._limits.max_expansion * self._read))
        if self._made > min(most, self._limits.max_bytes):
            raise TooLarge(
                f"The template makes more than {self._made:,} characters of {self._read:,}, more than any"
                " ordinary one; make it shorter",
                param="template",
                code="upload_too_large",
            )

    def close(self) -> None:
        self._given.close()

    def _send(self, lines: list[bytes]) -> None:
        try:
            self._given.write(b"".join(lines))
            self._given.flush()
        except BrokenPipeError:
            raise self._end() from None

    def _answer(self) -> dict[str, str]:
        """The next one. The template may have taken over the process, so that nothing about it is certain."""
        line = self._answers.readline(self._longest)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise self._end() from None
        if not isinstance(answer, dict) or not all(isinstance(value, str) for value in answer.values()):
            raise self._end()
        return answer

    def _end(self) -> Unprocessable | TooLarge:
        """Why there is no answer that could be one."""
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        if status == -signal.SIGXCPU or self._is_late:
            return TooLarge(
                "Rendering the template takes more time than the size of the upload allows for; make it simpler",
                param="template",
                code="upload_too_costly",
            )
        if status in (errno.ENOMEM, -signal.SIGABRT):
            return TooLarge(
                "Rendering the template takes too much memory; make it simpler",
                param="template",
                code="upload_too_large",
            )
        return Unprocessable("template: rendering it crashed; make it simpler", param="template")


@contextmanager
def _renderer(template: RowTemplate, limits: UploadSettings) -> Iterator[_Renderer]:
    command = [sys.executable, "-I", str(_PROCESS)]
    # Nothing of our environment, so no credentials.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}) as process:
        renderer = _Renderer(process, limits)
        try:
            with renderer.ended_if_late([]):
                renderer.start(template, limits)
            yield renderer
        finally:
            process.kill()
            with suppress(OSError):  # what it has not read is lost
                renderer.close()
