"""`winnow check`, the command."""

from pathlib import Path
from typing import Annotated

import typer

from winnow.cli.console import AsJson, Home, fail, require
from winnow.cli.datasets import Columns, Format, OnBadRow, Template
from winnow.options import Reading
from winnow.stack import DEFAULT_HOME

require("fastapi", "jinja2")  # imported when the command runs
check = typer.Typer(add_completion=False)


@check.command(no_args_is_help=True)
def run(
    file: Annotated[
        Path, typer.Argument(help="JSONL, JSON, CSV, TSV, text, Parquet or Arrow, also packed with gzip or zstd")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Count tokens as a job with this model would: a folder, the name of one in --models, or owner/name on the hub."
            " Needs the extra `worker`"
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(help="The folder of registered models; default: models in --home", envvar="WINNOW_MODELS__FOLDER"),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens that a job would cut rows to; the same as --set max_length=N")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the job: reasoning=strip, max_unusable=0.2"),
    ] = None,
    format: Format = None,
    columns: Columns = None,
    template: Template = None,
    on_bad_row: OnBadRow = None,
    show: Annotated[
        int, typer.Option(min=0, max=1000, help="Show the text of the first rows; ⟦what the loss counts⟧ is marked")
    ] = 0,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Say what an upload of the file would become, and with --model what a job would make of it; without any server.

    Exit status: 0 all rows are usable; 1 some are not (an upload refuses the file for those that are bad, unless it skips
    them; a job leaves the unusable out); 2 the file is refused whatever is skipped, or cannot be checked.
    """
    if model is None and (max_length is not None or settings):
        fail("--max-length and --set say how a job would render the rows: they need --model", 2)
    if not file.is_file():
        fail(f"{file}: there is no regular file of this name (what comes through a pipe cannot be read twice)", 2)
    if model is not None:
        try:
            require("torch", "transformers")
        except ModuleNotFoundError:
            fail("--model needs the worker's libraries: pip install 'winnow-select[worker]'", 2)
    from worker.check import main

    given = [*(settings or []), *([] if max_length is None else [f"max_length={max_length}"])]
    status = main.run(
        file,
        reading=Reading(format=format, columns=columns, template=template, on_bad_row=on_bad_row),
        model=model,
        registered=models or (home or DEFAULT_HOME) / "models",
        settings=given,
        show=show,
        as_json=as_json,
    )
    raise typer.Exit(status)
