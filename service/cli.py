"""The `winnow` command."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from service import audit_commands, key_commands, operate, show
from service import demo as demonstration
from service.assignments import assigned
from service.assignments import budget as read_budget
from service.client import Winnow
from service.console import DEFAULT_HOME, AsJson, Home, Key, Url, err, out
from service.console import connected as _client
from service.console import print_json as _print_json
from service.console import told as _told
from service.local import StackError, StackProcess, stop_stack

app = typer.Typer(help="Data selection as a service for fine-tuning language models.", no_args_is_help=True)
operate.register(app)
app.add_typer(key_commands.keys, name="keys")
audit_commands.register(app)


@app.command()
def up(
    home: Home = DEFAULT_HOME,
    port: Annotated[int, typer.Option(help="Of the API, on loopback")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64)] = 1,
) -> None:
    """Start the embedded stack and keep it running until Ctrl-C."""
    with _told(), _stopped_by_signals():
        stack_process = StackProcess(home, port=port, workers=workers)
        try:
            with err.status("Starting"):
                stack = stack_process.wait_ready()
            out.print(f"The API answers at {stack.url} (documentation: {stack.url}/docs).", soft_wrap=True)
            out.print(f"  export WINNOW_URL={stack.url} WINNOW_API_KEY=$(cat {stack.home}/api_key)", soft_wrap=True)
            out.print(
                f"Models: {stack.home}/models. Logs: {stack.home}/logs. Ctrl-C stops everything.",
                soft_wrap=True,
            )
            if stack_process.wait():
                raise StackError(f"the stack ended; see {stack.home}/stack.log")
        finally:
            stack_process.stop()


@app.command()
def down(home: Home = DEFAULT_HOME) -> None:
    """Stop the stack that runs from --home, and wait until it has ended."""
    with _told(), err.status("Stopping"):
        stop_stack(home)


@app.command()
def demo(
    home: Home = DEFAULT_HOME,
    keep: Annotated[bool, typer.Option(help="Leave the stack running")] = False,
    as_json: AsJson = False,
) -> None:
    """The whole service on the example data, in a few minutes."""
    with _told(), _stopped_by_signals():
        demonstration.run(home, keep=keep, as_json=as_json)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM unwind the stack of calls once; while it unwinds, more of them change nothing."""

    def stop(number: int, _: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise typer.Exit(128 + number)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    yield


Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field of the request: --set landmarks.count=256 --set selection=top_k"),
]


@app.command()
def submit(
    pool: Annotated[str, typer.Argument(help="A file (uploaded) or the id of a dataset")],
    target: Annotated[str, typer.Argument(help="A file (uploaded) or the id of a dataset")],
    model: Annotated[str, typer.Option(help="A registered name, or owner/name of the hub")],
    budget: Annotated[str, typer.Option(help="Samples to select: a number or a fraction")],
    settings: Settings = None,
    wait: Annotated[bool, typer.Option(help="Show progress until it has ended")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only show the plan and what it would cost")] = False,
    home: Home = DEFAULT_HOME,
    url: Url = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Post a selection job."""
    with _client(home, url, api_key) as client:
        ids = {name: _dataset(client, value) for name, value in (("pool", pool), ("target", target))}
        request = assigned(settings or [], {"model": model, "budget": read_budget(budget), **ids})
        if dry_run or request.get("dry_run"):
            plan = client.plan(**request)
            _print_json(plan) if as_json else show.plan(out, plan)
            return
        job = client.create_job(**request)
        if not as_json:
            out.print(f"Posted {job['id']}")
        if wait:
            job = show.follow(client, job["id"], err if as_json else out)
            if not as_json:
                show.results(out, client.results(job["id"]), list(client.selected(job["id"])))
        if as_json:
            _print_json(job)


def _dataset(client: Winnow, value: str) -> str:
    if value.startswith("ds_") and not Path(value).exists():
        return value
    return str(client.upload_dataset(value)["id"])


@app.command()
def jobs(
    limit: Annotated[int, typer.Option(min=1)] = 20,
    home: Home = DEFAULT_HOME,
    url: Url = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List your jobs, newest first."""
    with _client(home, url, api_key) as client:
        found = [job for job, _ in zip(client.jobs(), range(limit), strict=False)]
    if as_json:
        _print_json(found)
        return
    # In a narrow terminal the others give way, never the id: that is what one copies.
    table = Table(Column("id", no_wrap=True, min_width=36), "status", "phase", "budget", "created")
    for job in found:
        table.add_row(job["id"], job["status"], job["phase"] or "", str(job["budget"]), job["created_at"][:19])
    out.print(table)


@app.command()
def status(
    job_id: str,
    wait: Annotated[bool, typer.Option(help="Show progress until it has ended")] = False,
    home: Home = DEFAULT_HOME,
    url: Url = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show where a job is."""
    with _client(home, url, api_key) as client:
        job = show.follow(client, job_id, err if as_json else out) if wait else client.job(job_id)
    if as_json:
        _print_json(job)
        return
    out.print(f"{job['id']}: {job['status']}")
    for stage in job["stages"]:
        out.print(
            f"  {stage['stage']:<20} {stage['done']}/{stage['total']} samples, {stage['units_done']}/{stage['units']} units"
        )
    if job["error"]:
        out.print(f"  {job['error']['code']}: {job['error']['detail']}", soft_wrap=True, markup=False)


@app.command()
def events(
    job_id: str, home: Home = DEFAULT_HOME, url: Url = None, api_key: Key = None, as_json: AsJson = False
) -> None:
    """List what happened to a job: its plan, its units, the loss of its warm-up."""
    with _client(home, url, api_key) as client:
        found = list(client.events(job_id))
    if as_json:
        _print_json(found)
        return
    for event in found:
        out.print(
            f"{event['created_at'][:19]}  {event['type']:<20} {_in_short(event['data'])}", soft_wrap=True, markup=False
        )


def _in_short(data: dict[str, Any]) -> str:
    """Figures and names; lists and objects (those of a plan) are for --json."""
    return " ".join(f"{name}={value}" for name, value in data.items() if not isinstance(value, dict | list))


@app.command()
def results(
    job_id: str, home: Home = DEFAULT_HOME, url: Url = None, api_key: Key = None, as_json: AsJson = False
) -> None:
    """Show the result of a job."""
    with _client(home, url, api_key) as client:
        summary = client.results(job_id)
        if as_json:
            _print_json(summary)
        else:
            show.results(out, summary, list(client.selected(job_id)))


@app.command()
def explain(
    job_id: str,
    index: Annotated[int, typer.Argument(min=0, help="The sample's position in the pool, from 0")],
    landmarks: Annotated[int, typer.Option(min=0, max=100, help="How many of those that spoke for it are named")] = 10,
    target: Annotated[int | None, typer.Option(min=0, help="Explain the influence on this target sample alone")] = None,
    home: Home = DEFAULT_HOME,
    url: Url = None,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show why a sample of a job has its influence."""
    with _client(home, url, api_key) as client:
        found = client.sample(job_id, index, landmarks=landmarks, target=target)
    if as_json:
        _print_json(found)
    else:
        show.sample(out, found)


@app.command()
def export(
    job_id: str,
    path: Annotated[Path, typer.Argument(help="Ends in .jsonl, .csv or .parquet")],
    selected_only: Annotated[bool, typer.Option(help="Only the selection, in rank order")] = False,
    messages: Annotated[bool, typer.Option(help="With the samples' content: ready to train on")] = False,
    home: Home = DEFAULT_HOME,
    url: Url = None,
    api_key: Key = None,
) -> None:
    """Download one weight a sample."""
    with _client(home, url, api_key) as client:
        client.export(job_id, path, selected_only=selected_only, include="messages" if messages else None)
    out.print(f"Wrote {path}", soft_wrap=True, markup=False)


@app.command()
def cancel(
    job_id: str, home: Home = DEFAULT_HOME, url: Url = None, api_key: Key = None, as_json: AsJson = False
) -> None:
    """Cancel a job."""
    with _client(home, url, api_key) as client:
        job = client.cancel(job_id)
    if as_json:
        _print_json(job)
    else:
        out.print(f"{job['id']}: {job['status']}")


@app.command()
def delete(job_id: str, home: Home = DEFAULT_HOME, url: Url = None, api_key: Key = None) -> None:
    """Delete a job that has ended: its results go, its provenance stays."""
    with _client(home, url, api_key) as client:
        client.delete_job(job_id)
    out.print(f"{job_id}: deleted")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def select(context: typer.Context) -> None:
    """The whole job in one process, without servers: winnow select --help"""
    # A module of the worker: the service never imports torch, so the command becomes that program.
    os.execv(sys.executable, [sys.executable, "-m", "worker.inprocess", *context.args])


def main() -> None:
    app()
