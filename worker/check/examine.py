"""The whole check of a file, ready for JSON."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.progress import Progress

from service.datasets.bad_rows import REPORT, OnBadRow
from service.datasets.convert import convert
from service.datasets.rows.options import RowOptions
from service.datasets.storage import Content, Sample, samples_of
from service.http.errors import ApiError
from service.settings import UploadSettings
from service.storage.tempdirs import temporary_directory
from winnow.marked_text import plain
from worker.check.bad_rows import bad_rows
from worker.check.lengths import Lengths, characters

if TYPE_CHECKING:
    from worker.check.tokens import Model

_REPORT_ROWS = 1_000
_TOLD_ERRORS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is checked: the file as it is read, with a model or without; `show`: how many rows are shown."""

    file: Path
    reading: RowOptions
    on_bad_row: OnBadRow
    model: "Model | None"
    show: int


def examine(options: Options, progress: Progress) -> dict[str, Any]:
    """What an upload of the file would become.

    Memory holds what `convert` does, and then up to 24 bytes a row for the lengths; the rows are on the disk meanwhile.

    Raises:
        UnitError: the model's chat template is not valid, or takes too long.
        OSError: the file cannot be read.
    """
    with temporary_directory() as folder, options.file.open("rb") as file:
        found: dict[str, Any] = {"file": str(options.file), "bytes": os.fstat(file.fileno()).st_size}
        try:
            content = _converted(options, file, folder, progress)
        except ApiError as error:
            refused = {"code": error.problem_code, "detail": error.detail, "param": error.param}
            found["refused"] = {**refused, "errors": list(error.errors or ())[:_TOLD_ERRORS]}
            report = folder / REPORT
            found["bad_rows"] = bad_rows(report) if error.problem_code == "invalid_rows" else None
            return {**found, "upload": "refused"}
        found["refused"] = None
        found["bad_rows"] = None if content.report is None else bad_rows(content.report)
        found |= _of_rows(content, options, progress)
    found["upload"] = "refused" if content.skipped and options.on_bad_row is OnBadRow.REFUSE else "stored"
    return found


def status_of(found: dict[str, Any]) -> int:
    """The exit status: 0 all rows are usable, 1 some are not, 2 the file is refused."""
    if found["refused"] is not None:
        return 2
    unusable = found["model"]["unusable"]["count"] if found["model"] is not None else 0
    return 1 if found["bad_rows"] is not None or unusable else 0


def _converted(options: Options, file: IO[bytes], folder: Path, progress: Progress) -> Content:
    """Its bad rows are skipped, so that all are known, whatever becomes of them in an upload."""
    bar = progress.add_task("reading", total=os.fstat(file.fileno()).st_size, rows=0)
    told = 0

    def report(rows: int) -> None:
        nonlocal told
        if rows >= told + _REPORT_ROWS:
            told = rows
            # Of the open file, so also where another process reads it.
            progress.update(bar, completed=os.lseek(file.fileno(), 0, os.SEEK_CUR), rows=rows)

    content = convert(file, options.reading, UploadSettings(), folder, options.file.name, OnBadRow.SKIP, report=report)
    progress.update(bar, completed=progress.tasks[bar].total, rows=content.row_count + content.skipped)
    return content


def _of_rows(content: Content, options: Options, progress: Progress) -> dict[str, Any]:
    whole, counted = Lengths(), Lengths()
    shown: list[dict[str, Any]] = []
    bar = progress.add_task("rendering" if options.model else "measuring", total=content.row_count, rows=0)

    def measured() -> Iterator[Sample]:
        for sample in samples_of(content):
            for lengths, length in zip((whole, counted), characters(sample), strict=True):
                lengths.add(length)
            if len(shown) < options.show:
                shown.append({"index": sample.index, "id": sample.id, **_text(sample, options.model)})
            yield sample

    def report(done: int) -> None:
        progress.update(bar, completed=done, rows=done)

    of_model = None
    if options.model is None:
        _pass(measured(), report)
    else:
        of_model = options.model.counts(measured(), content.row_count, report)
    return {
        "rows": content.row_count,
        "detected": content.detected,
        "sources": content.sources,
        "characters": {"all": whole.summary(), "counted": counted.summary()},
        "model": of_model,
        "shown": shown,
    }


def _pass(samples: Iterable[Sample], report: Callable[[int], None]) -> None:
    done = 0
    for done, _ in enumerate(samples, 1):
        if done % _REPORT_ROWS == 0:
            report(done)
    report(done)


def _text(sample: Sample, model: "Model | None") -> dict[str, Any]:
    if model is not None:
        return model.renderer.row(sample)
    text, spans = plain({"messages": sample.messages, "tools": sample.tools, "text": sample.text})
    return {"text": text, "spans": spans}
