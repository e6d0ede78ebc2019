"""Makes the check and prints what it found."""

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from service.datasets.bad_rows import OnBadRow
from service.http.errors import ApiError
from winnow.cli.console import err, fail, out
from winnow.options import Reading
from worker.check import report
from worker.check.examine import Options, examine, status_of
from worker.errors import UnitError
from worker.given_options import row_options_of


def run(
    file: Path,
    *,
    reading: Reading,
    model: str | None,
    registered: Path,
    settings: list[str],
    show: int,
    as_json: bool,
) -> int:
    """The exit status. The arguments are those of `Options` and `Model`, as they are given.

    Raises:
        typer.Exit: with a message and status 2, where the check cannot be made.
    """
    try:
        options = Options(
            file=file,
            reading=row_options_of(reading),
            on_bad_row=OnBadRow(reading.on_bad_row or OnBadRow.REFUSE),
            model=None if model is None else _model(model, registered, settings),
            show=show,
        )
        columns = TextColumn("{task.description:<10}"), BarColumn(), TaskProgressColumn()
        with Progress(*columns, TextColumn("{task.fields[rows]:,} rows"), TimeElapsedColumn(), console=err) as progress:
            found = examine(options, progress)
    except (ApiError, UnitError) as error:
        fail(error.detail, 2)
    except OSError as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(found))
    else:
        _print(out, found)
    return status_of(found)


def _model(name: str, registered: Path, settings: list[str]) -> Any:
    from worker.check.tokens import Model  # takes seconds, and needs the extra `worker`

    return Model(name, registered, settings)


def _print(console: Console, found: dict[str, Any]) -> None:
    for line in report.lines(found):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
