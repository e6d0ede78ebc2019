"""`winnow keys ...`: API keys, for who runs the service: of all tenants, and with any scope."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Column, Table

from service.operate import fail, settings_problem
from service.tenants.caller import Scope

if TYPE_CHECKING:  # what takes long to import waits for the command that needs it
    from sqlalchemy.orm import Session

    from service.settings import DatabaseSettings

keys = typer.Typer(help="API keys (needs the API's settings in the environment).", no_args_is_help=True)


@contextmanager
def _transaction(settings: "DatabaseSettings") -> Iterator["Session"]:
    from sqlalchemy.exc import DBAPIError

    from service.database import make_engine, make_sessions

    engine = make_engine(settings)
    try:
        with make_sessions(engine).begin() as session:
            yield session
    except DBAPIError as error:
        fail(f"the database: {str(error.orig).strip()}")
    finally:
        engine.dispose()


def _database() -> "DatabaseSettings":
    from service.settings import database_settings

    try:
        return database_settings()
    except ValueError as error:
        fail(settings_problem(error))


@keys.command("create")
def create(
    tenant: Annotated[str, typer.Option(help="Created where it is new")],
    name: Annotated[str, typer.Option(help="What the key is for")] = "default",
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="Once for each; default: read and submit. admin: makes keys, reads the audit log"),
    ] = None,
    expires_in_days: Annotated[int | None, typer.Option(min=1, max=3650, help="Default: never")] = None,
) -> None:
    """Make an API key; it is shown once."""
    from service.settings import api_settings
    from service.tenants import service as tenants

    try:
        settings = api_settings()
    except ValidationError as error:
        fail(str(error))
    with _transaction(settings.database) as session:
        key = tenants.create_key(
            session,
            tenant_name=tenant,
            key_name=name,
            secret_key=settings.secret_key.get_secret_value(),
            scopes=scope or (Scope.READ, Scope.SUBMIT),
            expires_at=None if expires_in_days is None else datetime.now(UTC) + timedelta(days=expires_in_days),
        )
    print(key)  # once it is kept


@keys.command("list")
def show(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """List the keys of all tenants, revoked ones too."""
    from service.tenants import repository
    from service.tenants.schemas import KeyObject, shown
    from service.tenants.service import KEY_START

    with _transaction(_database()) as session:
        found = [(KeyObject(**shown(row, KEY_START)), name) for row, name in repository.of_all_tenants(session, tenant)]
    if as_json:
        print(json.dumps([{"tenant": name, **key.model_dump(mode="json")} for key, name in found], indent=2))
        return
    # In a narrow terminal the others give way, never the prefix: that is what one copies.
    table = Table("tenant", "name", Column("prefix", no_wrap=True, min_width=16), "scopes", "state", "last used")
    for key, name in found:
        used = "never" if key.last_used_at is None else f"{key.last_used_at:%Y-%m-%d %H:%M}"
        table.add_row(name, key.name, key.prefix, " ".join(key.scopes), _state(key.revoked_at, key.expires_at), used)
    Console().print(table)


def _state(revoked_at: datetime | None, expires_at: datetime | None) -> str:
    if revoked_at is not None:
        return f"revoked {revoked_at:%Y-%m-%d}"
    if expires_at is None:
        return "live"
    return f"{'expired' if expires_at <= datetime.now(UTC) else 'until'} {expires_at:%Y-%m-%d}"


@keys.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(metavar="PREFIX_OR_ID", help="As `winnow keys list` shows it, or key_...")],
) -> None:
    """Revoke a key: from now on it opens nothing. Safe to repeat."""
    from service.audit import service as audit
    from service.tenants import repository

    start = re.match(r"(?:wnw_)?([0-9a-f]{12})(?:_|$)", key)  # a whole key will do: who found it wants it revoked
    with _transaction(_database()) as session:
        row = repository.by_prefix_or_id(session, start[1] if start else key)
        if row is None:
            fail("there is no key with this prefix or id; see `winnow keys list`")
        if repository.revoke(session, row):
            audit.record_own(session, "cli", row.tenant_id, "key.revoked", row.id, name=row.name, prefix=row.prefix)
    print(f"wnw_{row.prefix} ({row.id}): revoked")
