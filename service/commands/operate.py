"""The commands of `winnow` for operators. They read the settings from the environment, as the API and the workers do."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import typer
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

import service.tables  # noqa: F401  # every table must be known before one is mapped to its foreign keys
from service.audit import service as audit
from service.db.engine import make_engine, make_sessions
from service.db.migrate import MigrationError, upgrade
from service.local.doctor import examine
from service.retention.service import collect as collect_garbage
from service.settings import DatabaseSettings, Settings, database_settings, settings_problem
from service.storage.artifacts import ArtifactStore
from winnow.cli.console import AsJson, Home, fail


@contextmanager
def settings_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        fail(settings_problem(error))


@contextmanager
def database(settings: DatabaseSettings, advice: str = "") -> Iterator[Engine]:
    """The database; a database error ends the program with its message and the advice."""
    engine = make_engine(settings)
    try:
        yield engine
    except DBAPIError as error:
        fail(f"the database: {str(error.orig).strip()}{advice}")
    finally:
        engine.dispose()


def migrate() -> None:
    """Migrate the database (WINNOW_DATABASE__URL) to this version."""
    with settings_errors():
        settings = database_settings()
    try:
        before = upgrade(settings.url, notify=lambda message: print(f"winnow: {message}", file=sys.stderr, flush=True))
    except MigrationError as error:
        fail(f"{error}.")
    if before.is_later:
        print(
            f"The database is at {before.current}, from a later version than this one, which knows up to {before.newest}."
        )
    elif before.current == before.newest:
        print(f"The database is already at {before.newest}.")
    else:
        with database(settings) as engine, make_sessions(engine).begin() as session:
            versions = {"before": before.current, "after": before.newest}
            audit.record_own(session, "cli", None, "database.migrated", "database", **versions)
        print(f"Migrated the database from {before.current or 'nothing'} to {before.newest}.")


def collect(
    dry_run: Annotated[bool, typer.Option(help="Remove nothing; list what would be removed")] = False,
    as_json: AsJson = False,
) -> None:
    """Apply retention now: remove what is too old, too large (WINNOW_RETENTION__*) or unreferenced. The API does so regularly."""
    with settings_errors():
        settings = Settings()
    store = ArtifactStore(settings.artifacts.url)
    with database(settings.database, ". What has been removed stays removed; rerun the command.") as engine:
        found = collect_garbage(make_sessions(engine), store, settings.retention, dry_run=dry_run)
    if as_json:
        print(json.dumps({"dry_run": dry_run, **asdict(found)}))
        return
    print("Would remove:" if dry_run else "Removed:")
    for kind, tally in sorted(found.removed.items()):
        print(f"  {kind:<14} {tally.files:>9,} files {tally.bytes:>18,} bytes")
    counts = {
        "jobs": len(found.jobs),
        "uploads": len(found.uploads),
        "workers": len(found.workers),
        "scratch": found.scratch,
    }
    for name, count in counts.items():
        print(f"  {name:<14} {count:>9,}")
    if found.unknown.files:
        print(f"Left alone: {found.unknown.files:,} files of {found.unknown.bytes:,} bytes that are not Winnow's.")


def doctor(
    home: Home = None,
    deep: Annotated[bool, typer.Option(help="Read every file of the artifact store, and list what is damaged")] = False,
    as_json: AsJson = False,
) -> None:
    """Check everything that the service needs, with causes and remedies. Exit status 1 if a check fails."""
    findings = examine(home, deep=deep)
    print(json.dumps([asdict(finding) for finding in findings], indent=2) if as_json else "\n".join(map(str, findings)))
    if any(finding.level == "FAIL" for finding in findings):
        raise typer.Exit(1)
