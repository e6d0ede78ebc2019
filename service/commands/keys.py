"""`winnow keys ...`: API keys, for operators: of all tenants, and with any scope."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from sqlalchemy.orm import Session

from service.audit import service as audit
from service.auth.principal import Scope
from service.commands.operate import database, settings_errors
from service.db.engine import make_sessions
from service.keys import repository
from service.keys.schemas import KeyOut, shown
from service.keys.service import create_key
from service.names import check_name
from service.settings import DatabaseSettings, api_settings, database_settings
from winnow.cli.console import AsJson, fail

keys = typer.Typer(
    help="Manage API keys (requires the API's settings in the environment).", no_args_is_help=True, add_completion=False
)


@contextmanager
def _transaction(settings: DatabaseSettings | None = None) -> Iterator[Session]:
    if settings is None:
        with settings_errors():
            settings = database_settings()
    with database(settings) as engine, make_sessions(engine).begin() as session:
        yield session


def _name(value: str) -> str:
    try:
        return check_name(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@keys.command("create")
def create(
    tenant: Annotated[str, typer.Option(help="Created if it does not exist", callback=_name)],
    name: Annotated[str, typer.Option(help="What the key is for", callback=_name)] = "default",
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="May be repeated; default: read and submit. admin manages keys and reads the audit log"),
    ] = None,
    expires_in_days: Annotated[int | None, typer.Option(min=1, max=3650, help="Default: never")] = None,
) -> None:
    """Create an API key; it is shown only once."""
    with settings_errors():
        settings = api_settings()
    with _transaction(settings.database) as session:
        key = create_key(
            session,
            tenant_name=tenant,
            key_name=name,
            secret_key=settings.secret_key.get_secret_value(),
            scopes=scope or (Scope.READ, Scope.SUBMIT),
            expires_at=None if expires_in_days is None else datetime.now(UTC) + timedelta(days=expires_in_days),
        )
    print(key)  # after the commit


@keys.command("list")
def show(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's")] = None,
    as_json: AsJson = False,
) -> None:
    """List the keys of all tenants, including revoked ones."""
    with _transaction() as session:
        found = [(KeyOut(**shown(row)), name) for row, name in repository.of_all_tenants(session, tenant)]
    if as_json:
        print(json.dumps([{"tenant": name, **key.model_dump(mode="json")} for key, name in found], indent=2))
        return
    # In a narrow terminal the other columns shrink, never the prefix: it is there to be copied.
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
    """Revoke a key. Safe to repeat."""
    # A whole key is accepted too: someone who finds one wants it revoked.
    start = re.match(r"(?:wnw_)?([0-9a-f]{12})(?:_|$)", key)
    with _transaction() as session:
        row = repository.by_prefix_or_id(session, start[1] if start else key)
        if row is None:
            fail("no key with this prefix or id; see `winnow keys list`")
        if repository.revoke(session, row):
            audit.record_own(session, "cli", row.tenant_id, "key.revoked", row.id, name=row.name, prefix=row.prefix)
    print(f"wnw_{row.prefix} ({row.id}): revoked")
