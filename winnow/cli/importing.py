"""`winnow import`: a dataset of the Hugging Face Hub, imported by the service."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from winnow import render
from winnow.answers import Dataset
from winnow.cli.console import connected, err, options, out, print_json
from winnow.cli.datasets import Columns, Format, OnBadRow, Template
from winnow.client import Winnow
from winnow.options import Reading


def register(app: typer.Typer) -> None:
    """Adds the command to the program."""
    app.command("import")(import_)


def import_(
    id: Annotated[str, typer.Argument(help="Of the dataset on the hub: owner/name")],
    split: Annotated[str | None, typer.Option(help="Default: the only one")] = None,
    config: Annotated[str | None, typer.Option(help="Default: that of the dataset, or the only one")] = None,
    revision: Annotated[str, typer.Option(help="A branch, a tag or a commit")] = "main",
    name: Annotated[str | None, typer.Option(help="Of the dataset; default: of id, config and split")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first rows, so many")] = None,
    format: Format = None,
    columns: Columns = None,
    template: Template = None,
    on_bad_row: OnBadRow = None,
    wait: Annotated[bool, typer.Option(help="Wait until it is imported; it goes on regardless")] = True,
) -> None:
    """Import a dataset from the Hugging Face Hub, and show what was taken of it."""
    reading = Reading(format=format, columns=columns, template=template, on_bad_row=on_bad_row)
    with connected() as client:
        dataset = client.import_dataset(id, split, config, revision, name=name, limit=limit, **asdict(reading))
        if wait:
            dataset = imported(client, dataset["id"], err)
    print_json(dataset) if options.as_json else render.dataset(out, dataset)


def imported(client: Winnow, dataset_id: str, console: Console) -> Dataset:
    """The dataset once it is ready; in a terminal with what was downloaded and read until then.

    Raises:
        ImportFailed: its import has failed.
    """
    if not console.is_terminal:
        return client.imported(dataset_id)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"{dataset_id}: waiting for a worker", total=None, note="")

        def update(dataset: Dataset) -> None:
            if (at := dataset.progress) is not None and at.total_bytes:
                note = f"{at.bytes / 1e6:,.1f} of {at.total_bytes / 1e6:,.1f} MB, {at.rows:,} rows"
                doing = f"{dataset_id}: importing"
                progress.update(bar, completed=at.bytes, total=at.total_bytes, description=doing, note=note)

        return client.imported(dataset_id, on_update=update)
