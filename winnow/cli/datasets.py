"""The commands for datasets, and the options of every command that reads a file of samples."""

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer

from winnow import marked_text, render
from winnow.cli.console import as_json, connected, err, fail, options, out, print_json, show
from winnow.cli.groups import add_group
from winnow.cli.records import TableColumns, print_records
from winnow.options import Reading, assigned
from winnow.upload_bar import uploading

Format = Annotated[
    str | None, typer.Option(help="The form of the rows, where they fit more than one: messages, text, ...")
]
Columns = Annotated[
    str | None,
    typer.Option(metavar="PART:COLUMN,...", help="Which columns hold what: prompt:question,completion:answer"),
]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help='Jinja templates over a row: \'{"user": "{{ question }}", "assistant": "{{ answer }}"}\'',
    ),
]
OnBadRow = Annotated[
    Literal["refuse", "skip"] | None,
    typer.Option(help="skip: leave out rows that cannot be used; refuse, the default: refuse the file"),
]
TargetFormat = Annotated[str | None, typer.Option(help="The same of the target alone")]
TargetColumns = Annotated[str | None, typer.Option(metavar="PART:COLUMN,...", help="The same of the target alone")]
TargetTemplate = Annotated[str | None, typer.Option(metavar="JSON", help="The same of the target alone")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for command in (upload, rows, skipped):
        app.command()(command)
    group = {"ls": list_datasets, "get": get, "upload": upload, "rows": rows, "skipped": skipped, "rm": delete}
    add_group(app, "datasets", "Datasets: upload, list, read and delete them.", group)
    targets = {"ls": list_targets, "get": get_target}
    add_group(app, "targets", "The ready-made targets, which `winnow submit POOL preset:NAME` takes.", targets)


def upload(
    file: Annotated[Path, typer.Argument(help="The file to upload")],
    name: Annotated[str | None, typer.Option(help="Of the dataset; default: the file's name")] = None,
    format: Format = None,
    columns: Columns = None,
    template: Template = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """Upload a dataset, and show what was taken of it. A large file goes on where it was interrupted when you send it again."""
    reading = Reading(format=format, columns=columns, template=template, on_bad_row=on_bad_row)
    with connected() as client, uploading(err, file.name) as on_progress:
        dataset = client.upload_dataset(file, name, on_progress=on_progress, **asdict(reading))
    print_json(dataset) if options.as_json else render.dataset(out, dataset)


def skipped(dataset_id: str) -> None:
    """List the rows of an upload that were left out, as JSON lines."""
    with connected() as client:
        for row in client.skipped_rows(dataset_id):
            print(as_json(row))


def rows(
    dataset_id: str,
    model: Annotated[
        str | None, typer.Option(help="Show them as this model's chat template renders them, with their tokens")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many rows")] = 10,
    after: Annotated[int | None, typer.Option(min=0, help="Begin after the row with this index")] = None,
    max_length: Annotated[int | None, typer.Option(help="The same as --set max_length=N")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="With --model, as of a job: reasoning, template_arguments.X"),
    ] = None,
) -> None:
    """Show rows of a dataset; ⟦what the loss counts⟧ is marked. With --json, as JSON lines."""
    given = [*(settings or []), *([] if max_length is None else [f"max_length={max_length}"])]
    with connected() as client:
        arguments = assigned(given)
        if unknown := arguments.keys() - {"reasoning", "template_arguments", "max_length"}:
            fail(f"--set {min(unknown)}: rows have reasoning, template_arguments and max_length", 2)
        for row in client.rows(dataset_id, model=model, limit=limit, after=after, on_wait=_waiting, **arguments):
            if options.as_json:
                print(as_json(row))
                continue
            for line in marked_text.lines(row.to_dict(), row.to_dict().get("rendered")):
                out.print(line, soft_wrap=True, markup=False, highlight=False)


def _waiting(why: str) -> None:
    err.print(why, soft_wrap=True, markup=False, highlight=False)


def list_targets() -> None:
    """List the ready-made targets."""
    with connected() as client:
        found = client.targets()
    if out.is_terminal and not options.as_json:
        render.targets(out, found)
    else:
        columns: TableColumns = {
            "name": lambda target: target.name,
            "title": lambda target: target.title,
            "hub": lambda target: f"{target.hub.id}:{target.hub.config}:{target.hub.split}",
            "licence": lambda target: target.licence,
            "samples": lambda target: target.samples,
            "taken": lambda target: target.count,
        }
        print_records(found, columns)


def get_target(name: str) -> None:
    """Show a ready-made target with its template."""
    with connected() as client:
        found = client.targets()
    chosen = next((each for each in found if each.name == name), None)
    if chosen is None:
        fail(f"{name!r} is no ready-made target; there are {', '.join(each.name for each in found)}")
    print_json(chosen) if options.as_json else render.target(out, chosen)


def list_datasets(limit: Annotated[int, typer.Option(min=1, help="How many, at most")] = 20) -> None:
    """List your datasets, newest first."""
    columns: TableColumns = {
        "id": lambda dataset: dataset.id,
        "name": lambda dataset: dataset.name,
        "status": lambda dataset: dataset.status,
        "rows": lambda dataset: dataset.row_count,
        "created": lambda dataset: dataset.created_at,
    }
    with connected() as client:
        print_records(islice(client.datasets(), limit), columns)


def get(dataset_id: str) -> None:
    """Show a dataset: its rows, and what was taken of the upload."""
    with connected() as client:
        dataset = client.dataset(dataset_id)
    print_json(dataset) if options.as_json else render.dataset(out, dataset)


def delete(dataset_id: str) -> None:
    """Delete a dataset; jobs over it keep their results."""
    with connected() as client:
        client.delete_dataset(dataset_id)
    show({"id": dataset_id, "deleted": True}, f"{dataset_id}: deleted")
