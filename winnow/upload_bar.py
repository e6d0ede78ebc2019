"""How the command line shows an upload on its way: as a bar in a terminal, elsewhere as a line every few seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from winnow.uploading import OnProgress, UploadProgress

_LINE_SECONDS = 5.0
_STEPS = {"checksum": "reading", "send": "sending", "read": "converting"}


@contextmanager
def uploading(console: Console, name: str, line_seconds: float = _LINE_SECONDS) -> Iterator[OnProgress]:
    """What is to be called with the progress of the upload of this name."""
    if not console.is_terminal:
        yield _Lines(console, name, line_seconds)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bars: dict[str, TaskID] = {}

        def update(at: UploadProgress) -> None:
            for step, bar in bars.items():
                progress.update(bar, visible=step == at.step)
            if at.step not in bars:
                # What came in an earlier attempt is no speed of this one.
                bars[at.step] = progress.add_task(
                    f"{name}: {_STEPS[at.step]}", total=at.total, completed=at.done, note=_note(at)
                )
            else:
                progress.update(bars[at.step], completed=at.done, note=_note(at))

        yield update


class _Lines:
    def __init__(self, console: Console, name: str, seconds: float) -> None:
        self._console, self._name, self._seconds = console, name, seconds
        self._next = time.monotonic() + seconds

    def __call__(self, at: UploadProgress) -> None:
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + self._seconds
        line = f"{self._name}: {_STEPS[at.step]}, {_note(at)}"
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def _note(at: UploadProgress) -> str:
    return f"{at.done:,} rows" if at.total is None else f"{at.done / 1e6:,.1f} of {at.total / 1e6:,.1f} MB"
