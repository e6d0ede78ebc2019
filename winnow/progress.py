"""How a job's progress is shown while it is waited for: as bars in a terminal or a notebook, elsewhere as a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from winnow.answers import SelectionJob, StageReport

if TYPE_CHECKING:
    from winnow.client import Winnow
    from winnow.handles import Job

Watch = Callable[[SelectionJob], object]

_LINE_SECONDS = 5.0


@contextmanager
def watching(progress: bool | None) -> Iterator[Watch | None]:
    """What is to be called with a job that has changed; None: nothing is to be shown.

    Args:
        progress: None: only where a terminal or a notebook shows bars; True: elsewhere as lines.
    """
    display = None if progress is False else _notebook_display()
    if display is not None:
        yield _InNotebook(display)
        return
    console = Console(stderr=True)
    if progress or (progress is None and console.is_terminal):
        with showing(console) as watch:
            yield watch
    else:
        yield None


@contextmanager
def showing(console: Console, line_seconds: float = _LINE_SECONDS) -> Iterator[Watch]:
    """Bars on a terminal, one for each stage; else a line every so many seconds, and whenever the status changes."""
    if not console.is_terminal:
        yield _Lines(console, line_seconds)
        return
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def update(job: SelectionJob) -> None:
            for stage in job.stages:
                name = stage.stage
                if name not in bars:
                    bars[name] = progress.add_task(name, total=stage.total, start=False, note="")
                if stage.started_at is not None and not progress.tasks[bars[name]].started:
                    progress.start_task(bars[name])
                progress.update(bars[name], completed=stage.done, note=_note(stage))
                if stage.seconds is not None:
                    progress.stop_task(bars[name])

        yield update


def follow(client: "Winnow", job_id: str, console: Console) -> "Job":
    """Shows the progress of a job until it has succeeded, and returns the job.

    Raises:
        JobFailed: it failed or was cancelled.
    """
    with showing(console) as watch:
        return client.wait(job_id, on_update=watch, poll_seconds=1)


def _note(stage: StageReport) -> str:
    if stage.seconds is None:
        return f"{stage.units_done}/{stage.units} units" if stage.units > 1 else ""
    reused = f", {stage.units_reused} of {stage.units} reused" if stage.units_reused else ""
    return f"{stage.seconds:.1f} s{reused}"


class _Lines:
    def __init__(self, console: Console, seconds: float) -> None:
        self._console, self._seconds = console, seconds
        self._next = 0.0
        self._status = ""

    def __call__(self, job: SelectionJob) -> None:
        now = time.monotonic()
        if job.status == self._status and now < self._next:
            return
        self._status, self._next = job.status, now + self._seconds
        at = job.progress
        stage = f", {at.phase} {at.done:,}/{at.total:,} {at.unit}" if at is not None else ""
        self._console.print(f"{job.id}: {job.status}{stage}", soft_wrap=True, markup=False, highlight=False)


class _InNotebook:
    """Shows the job by its own `_repr_html_`, and shows it anew in the same place."""

    def __init__(self, display: Callable[..., Any]) -> None:
        self._display, self._handle = display, None

    def __call__(self, job: SelectionJob) -> None:
        if self._handle is None:
            self._handle = self._display(job, display_id=True)
        else:
            self._handle.update(job)


def _notebook_display() -> Callable[..., Any] | None:
    """IPython's `display`, where this process is the kernel of a notebook."""
    if "ipykernel" not in sys.modules or "IPython" not in sys.modules:
        return None
    from IPython import get_ipython
    from IPython.display import display

    shell = get_ipython()
    return display if getattr(shell, "kernel", None) is not None else None
