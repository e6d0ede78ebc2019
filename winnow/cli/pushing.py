"""`winnow push`: a selection on the Hugging Face Hub."""

from typing import Annotated

import typer

from winnow.cli.console import cli_errors, connected, show


def register(app: typer.Typer) -> None:
    """Adds the command to the program."""
    app.command()(push)


def push(
    job_id: str,
    repository: Annotated[str, typer.Argument(help="Of a dataset on the hub: owner/name")],
    public: Annotated[bool, typer.Option("--public", help="Everyone may read it")] = False,
) -> None:
    """Push the selection to the Hugging Face Hub, with a card of its provenance, fidelity and verdict; private by default."""
    with connected() as client, cli_errors(ModuleNotFoundError):
        commit = client.results(job_id).push(repository, public=public)
    show({"repository": repository, "commit": commit}, f"Pushed {commit}")
