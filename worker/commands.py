"""`winnow select`, the command that computes without servers."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from winnow.cli.console import AsJson, require
from winnow.cli.datasets import (
    Columns,
    Format,
    OnBadRow,
    TargetColumns,
    TargetFormat,
    TargetTemplate,
    Template,
)
from winnow.cli.jobs import Duplicates, Overlap
from winnow.options import Reading, chosen

require("torch", "transformers")  # imported when the command runs: it takes seconds
select = typer.Typer(add_completion=False)


@select.command(no_args_is_help=True)
def run(
    model: Annotated[Path, typer.Option(help="A folder with config, tokenizer and safetensors")],
    pool: Annotated[
        Path, typer.Option(help="JSONL, JSON, CSV, TSV, text, Parquet or Arrow, also packed with gzip or zstd")
    ],
    target: Annotated[Path, typer.Option(help="The same, with examples of the desired behaviour")],
    budget: Annotated[str, typer.Option(help="Samples to select: a number, or a fraction between 0 and 1")],
    out: Annotated[Path, typer.Option(help="Ends in .jsonl, .csv or .parquet")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter: landmarks.count=256")
    ] = None,
    duplicates: Duplicates = None,
    overlap: Overlap = None,
    selected_only: Annotated[bool, typer.Option("--selected-only", help="Write only the selection")] = False,
    format: Format = None,
    columns: Columns = None,
    template: Template = None,
    on_bad_row: OnBadRow = None,
    target_format: TargetFormat = None,
    target_columns: TargetColumns = None,
    target_template: TargetTemplate = None,
    cache: Annotated[
        Path | None, typer.Option(help="A folder that keeps embeddings and gradients for later runs")
    ] = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    as_json: AsJson = False,
) -> None:
    """Select samples in one process, without servers."""
    from worker import local_run

    reading = Reading(format=format, columns=columns, template=template, on_bad_row=on_bad_row)
    local_run.main(
        local_run.Options(
            model=model, pool=pool, target=target, budget=budget, out=out,
            given=chosen(duplicates, overlap), settings=settings or [],
            selected_only=selected_only, cache=cache, device=device, as_json=as_json,
            reading=reading, target_reading=reading.of_target(target_format, target_columns, target_template),
        )
    )  # fmt: skip
