"""The commands of `winnow` for who runs the service. They read the settings of the environment, as API and workers do."""

import os
import sys
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError

keys = typer.Typer(help="API keys (needs the API's settings in the environment).", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command()(migrate)
    app.add_typer(keys, name="keys")


def fail(message: str) -> NoReturn:
    print(f"winnow: {message}", file=sys.stderr)
    raise typer.Exit(1)


def migrate() -> None:
    """Bring the database (WINNOW_DATABASE__URL) to this version."""
    from service.schema import MigrationError, upgrade
    from service.settings import DatabaseSettings

    try:
        settings = DatabaseSettings(url=os.environ.get("WINNOW_DATABASE__URL", ""))
    except ValidationError as error:
        fail(f"WINNOW_DATABASE__URL {error.errors()[0]['msg'].removeprefix('Value error, ')}")
    try:
        before = upgrade(settings.url, tell=lambda message: print(f"winnow: {message}", file=sys.stderr, flush=True))
    except MigrationError as error:
        fail(f"{error}.")
    if before.is_later:
        print(
            f"The database is at {before.current}, of a later version than this one, which knows up to {before.newest}."
        )
    elif before.current == before.newest:
        print(f"The database is at {before.newest} already.")
    else:
        print(f"The database went from {before.current or 'nothing'} to {before.newest}.")


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Created where it is new")],
    name: Annotated[str, typer.Option(help="What the key is for")] = "default",
) -> None:
    """Make an API key; it is shown once."""
    from service.database import make_engine, make_sessions
    from service.settings import api_settings
    from service.tenants import service as tenants

    try:
        settings = api_settings()
    except ValidationError as error:
        fail(str(error))
    with make_sessions(make_engine(settings.database)).begin() as session:
        secret = settings.secret_key.get_secret_value()
        print(tenants.create_key(session, tenant_name=tenant, key_name=name, secret_key=secret))
