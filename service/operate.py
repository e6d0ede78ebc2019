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
    from service.schema import upgrade
    from service.settings import DatabaseSettings

    try:
        settings = DatabaseSettings(url=os.environ.get("WINNOW_DATABASE__URL", ""))
    except ValidationError as error:
        fail(str(error))
    upgrade(settings.url)


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
