"""The commands for jobs, from posting one to its export."""

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from winnow import progress, render
from winnow.answers import Event
from winnow.cli.console import as_json, connected, err, options, out, print_json, show
from winnow.cli.datasets import (
    Columns,
    Format,
    OnBadRow,
    TargetColumns,
    TargetFormat,
    TargetTemplate,
    Template,
)
from winnow.cli.groups import add_group
from winnow.cli.records import TableColumns, print_records
from winnow.cli.samples import explain, samples
from winnow.client import Winnow
from winnow.companions import ExportPreset, companion
from winnow.handles import Job
from winnow.options import DuplicatesOption, OverlapOption, Reading, assigned, chosen, read_budget
from winnow.sources import SPELLINGS, Dataset, File, HubSplit, Preset, Source, read_source
from winnow.upload_bar import uploading

Wait = Annotated[bool, typer.Option(help="Show the progress until the job has ended")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field of the request: --set landmarks.count=256 --set selection=top_k"),
]

Duplicates = Annotated[
    DuplicatesOption | None,
    typer.Option(
        help="Of samples of the pool that say the same, or nearly: keep all, or one of each", show_default="keep"
    ),
]
Overlap = Annotated[
    OverlapOption | None,
    typer.Option(help="Samples of the pool that say the same as one of the target, or nearly", show_default="keep"),
]


Name = Annotated[str | None, typer.Option(help="What you call the job")]
Label = Annotated[
    list[str] | None, typer.Option("--label", help="KEY=VALUE, by which lists can be filtered; may be repeated")
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for command in (submit, status, events, results, samples, explain, export, cancel, delete, retry):
        app.command()(command)
    group = {
        "ls": list_jobs,
        "get": status,
        "inspect": inspect,
        "logs": events,
        "wait": wait_for,
        "results": results,
        "samples": samples,
        "explain": explain,
        "export": export,
        "change": change,
        "cancel": cancel,
        "retry": retry,
        "rm": delete,
    }
    add_group(app, "jobs", "Selection jobs: list, watch, read and end them.", group)


def follow(client: Winnow, job_id: str) -> Job:
    """Shows the progress of a job until it has succeeded; with --json on stderr."""
    return progress.follow(client, job_id, err if options.as_json else out)


def submit(
    pool: Annotated[str, typer.Argument(help=f"{SPELLINGS[0].upper()}{SPELLINGS[1:]}")],
    target: Annotated[
        str, typer.Argument(help="The same, or preset:NAME[:COUNT], of which `winnow targets` has a list")
    ],
    model: Annotated[str, typer.Option(help="The name of a registered model, or owner/name on the hub")],
    budget: Annotated[str, typer.Option(help="Samples to select: a number or a fraction")],
    settings: Settings = None,
    duplicates: Duplicates = None,
    overlap: Overlap = None,
    name: Name = None,
    label: Label = None,
    wait: Wait = False,
    dry_run: Annotated[
        bool,
        typer.Option(help="Only show the plan and its cost, of datasets that are uploaded; nothing is sent or created"),
    ] = False,
    format: Format = None,
    columns: Columns = None,
    template: Template = None,
    on_bad_row: OnBadRow = None,
    target_format: TargetFormat = None,
    target_columns: TargetColumns = None,
    target_template: TargetTemplate = None,
) -> None:
    """Post a selection job. --format, --columns and --template say how files are read where that cannot be told from them."""
    reading = Reading(format=format, columns=columns, template=template, on_bad_row=on_bad_row)
    of_target = reading.of_target(target_format, target_columns, target_template)
    with connected() as client:
        fields: dict[str, Any] = {"model": model, "budget": read_budget(budget)}
        fields |= chosen(duplicates, overlap) | _called(name, label)
        sources = read_source(pool, of_target=False), read_source(target, of_target=True)
        _check_used(sources, reading, of_target)
        is_plan = dry_run or bool(assigned(settings or []).get("dry_run"))
        if is_plan:
            _check_uploaded(sources)
        fields["pool"] = _named(client, sources[0], reading)
        fields["target"] = _named(client, sources[1], of_target)
        request = assigned(settings or [], fields)
        if is_plan:
            plan = client.plan(**request)
            print_json(plan) if options.as_json else render.plan(out, plan)
            return
        job = client.create_job(**request)
        if not options.as_json:
            out.print(f"Posted {job['id']}")
        if wait:
            job = follow(client, job["id"])
        if options.as_json:
            print_json(job)
        elif wait:
            render.results(out, client.results(job["id"]), list(client.selected(job["id"])))


def _called(name: str | None, labels: list[str] | None) -> dict[str, Any]:
    """The fields of a request that say what the job is called.

    Raises:
        ValueError: a label is no KEY=VALUE.
    """
    given = dict(label.partition("=")[::2] for label in labels or [] if "=" in label)
    if len(given) < len(labels or []):
        raise ValueError("--label: each is KEY=VALUE, and each key stands once")
    return ({} if name is None else {"name": name}) | ({"labels": given} if given else {})


def _check_used(sources: tuple[Source, Source], reading: Reading, of_target: Reading) -> None:
    """Whether what is said of how rows are read is of any use: the rows of a dataset and of a preset are read already."""
    reads_pool, reads_target = (isinstance(source, File | HubSplit) for source in sources)
    if of_target != reading and not reads_target:
        raise ValueError(
            "--target-format, --target-columns, --target-template: they are for a file or a dataset of the hub"
        )
    if reading != Reading() and not reads_pool and not reads_target:
        raise ValueError("--format, --columns, --template, --on-bad-row: they are for files and datasets of the hub")


def _check_uploaded(sources: tuple[Source, Source]) -> None:
    """A plan is made by the service from the rows that it has, and a dry run gives it none."""
    for name, source in zip(("pool", "target"), sources, strict=True):
        if isinstance(source, File | HubSplit):
            command = f"winnow upload {source.path}" if isinstance(source, File) else f"winnow import {source.id}"
            raise ValueError(
                f"--dry-run uploads and imports nothing, and the service plans from the {name} that it has: first `{command}`,"
                f" then pass its id, or see `winnow check` for what a file would become"
            )


def _named(client: Winnow, source: Source, reading: Reading) -> str | dict[str, Any]:
    """What the request has for a pool or target; a file is uploaded, and a dataset of the hub imported."""
    match source:
        case Dataset(id):
            return id
        case Preset(name, count):
            return {"preset": name} if count is None else {"preset": name, "count": count}
        case File(path):
            with uploading(err, path.name) as on_progress:
                dataset = client.upload_dataset(path, on_progress=on_progress, **asdict(reading))
        case HubSplit(id):
            dataset = client.import_dataset(id, source.split, source.config, source.revision, **asdict(reading))
    render.dataset(err if options.as_json else out, dataset)
    return str(dataset["id"])


def list_jobs(
    limit: Annotated[int, typer.Option(min=1, help="How many, at most")] = 20,
    status: Annotated[str | None, typer.Option(help="Only those: queued, running, succeeded, ...")] = None,
    name: Annotated[str | None, typer.Option(help="Only those whose name contains this")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE: only those with this label; may be repeated")
    ] = None,
) -> None:
    """List your jobs, newest first."""
    columns: TableColumns = {
        "id": lambda job: job.id,
        "status": lambda job: job.status,
        "phase": lambda job: job.phase,
        "budget": lambda job: job.budget,
        "created": lambda job: job.created_at,
        "name": lambda job: job.name,
        "labels": lambda job: " ".join(f"{key}={value}" for key, value in (job.labels or {}).items()),
    }
    with connected() as client:
        print_records(islice(client.jobs(status, name, _called(None, label).get("labels")), limit), columns)


def status(job_id: str, wait: Wait = False) -> None:
    """Show the status of a job and its stages."""
    with connected() as client:
        job = follow(client, job_id) if wait else client.job(job_id)
        place = client.queue_place(job_id) if job.status == "queued" and not options.as_json else None
    lines = render.called(job) + ([] if place is None else render.queue_place(place))
    lines += [
        f"  {stage.stage:<20} {stage.done}/{stage.total} samples, {stage.units_done}/{stage.units} units"
        for stage in job.stages
    ]
    if job.error:
        lines.append(f"  {job.error.code}: {job.error.detail}")
    show(job, f"{job.id}: {job.status}", *lines)


def change(
    job_id: str,
    name: Annotated[str | None, typer.Option(help="What you call it from now on")] = None,
    no_name: Annotated[bool, typer.Option("--no-name", help="It has no name any more")] = False,
    label: Label = None,
    unlabel: Annotated[list[str] | None, typer.Option(help="The key of a label to remove; may be repeated")] = None,
) -> None:
    """Change what a job is called, in any state of it. Labels that are not named stay."""
    if no_name and name is not None:
        raise typer.BadParameter("give either --name or --no-name")
    with connected() as client:
        changes = _called(name, label) | ({"name": None} if no_name else {})
        if unlabel:
            changes["labels"] = dict.fromkeys(unlabel) | changes.get("labels", {})
        job = client.change_job(job_id, **changes)
    show(job, job.id, *render.called(job))


def inspect(job_id: str) -> None:
    """Print everything about a job, as JSON."""
    with connected() as client:
        print_json(client.job(job_id))


def wait_for(
    job_id: str, timeout: Annotated[float | None, typer.Option(min=0, help="Seconds to wait at most")] = None
) -> None:
    """Wait for the end of a job, and show how far it is. Exit status 4 if it failed or was cancelled, 5 after --timeout."""
    with connected() as client, progress.showing(err) as watch:
        job = client.wait(job_id, watch, timeout, poll_seconds=1)
    show(job, f"{job.id}: {job.status}")


def events(
    job_id: str,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended")] = False,
) -> None:
    """List the events of a job: its plan, its units, the loss of its warm-up."""
    with connected() as client:
        if follow:
            for event in client.follow(job_id):
                print(as_json(event) if options.as_json else _line(event), flush=True)
        else:
            found = list(client.events(job_id))
            show(found, *map(_line, found))


def _line(event: Event) -> str:
    # Lists and objects, as those of a plan, are for --json.
    data = [f"{key}={value}" for key, value in event.data.items() if not isinstance(value, dict | list)]
    return f"{event.created_at:%Y-%m-%dT%H:%M:%S}  {event.type:<20} {' '.join(data)}"


def results(job_id: str) -> None:
    """Show the results of a job."""
    with connected() as client:
        summary = client.results(job_id)
        if options.as_json:
            print_json(summary)
        else:
            render.results(out, summary, list(client.selected(job_id)))


def export(
    job_id: str,
    path: Annotated[Path, typer.Argument(help="Ends in .jsonl, .csv or .parquet")],
    selected_only: Annotated[
        bool,
        typer.Option(
            "--selected-only/--all", help="Only the selection, in rank order; or the whole pool, in its order"
        ),
    ] = True,
    messages: Annotated[bool, typer.Option(help="Include the samples' content")] = True,
    escape_formulas: Annotated[
        bool, typer.Option(help="In CSV, put an apostrophe before texts that a spreadsheet would calculate")
    ] = True,
    preset: Annotated[
        ExportPreset | None,
        typer.Option(help="The JSON lines that a training tool reads, with the file that tells it how"),
    ] = None,
    repeat: Annotated[
        bool, typer.Option("--repeat", help="With --preset, each line as often as the sample's rounded weight")
    ] = False,
    rows_of: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Copy the rows out of the file that was uploaded, as they stand there, in their order"
        ),
    ] = None,
) -> None:
    """Download the selection with its content, ready to train on."""
    if rows_of is not None:
        if not selected_only or not messages or not escape_formulas or preset is not None or repeat:
            raise typer.BadParameter(
                "copies the selection as it stands in the file; omit the other options", param_hint="--rows-of"
            )
        with connected() as client:
            client.copy_rows(job_id, rows_of, path)
        show({"path": str(path)}, f"Wrote {path}")
        return
    with connected() as client:
        client.export(
            job_id,
            path,
            selected_only=selected_only,
            include="messages" if messages else None,
            escape_formulas=escape_formulas,
            preset=preset,
            repeat=repeat,
        )
    beside = None if preset is None else companion(preset, path)
    if beside is None:
        show({"path": str(path)}, f"Wrote {path}")
    else:
        files = {"path": str(path), "companion": str(beside.path)}
        show(files, f"Wrote {path}", f"Wrote {beside.path}: {beside.purpose}")


def cancel(job_id: str) -> None:
    """Cancel a job."""
    with connected() as client:
        job = client.cancel(job_id)
    show(job, f"{job['id']}: {job['status']}")


def delete(job_id: str) -> None:
    """Delete a job that has ended: its results are deleted, its provenance is kept."""
    with connected() as client:
        client.delete_job(job_id)
    show({"id": job_id, "deleted": True}, f"{job_id}: deleted")


def retry(job_id: str, wait: Wait = False) -> None:
    """Retry a failed or cancelled job, as a new job."""
    with connected() as client:
        job = client.retry(job_id)
        if not options.as_json:
            out.print(f"Posted {job['id']}")
        if wait:
            job = follow(client, job["id"])
    if options.as_json:
        print_json(job)
