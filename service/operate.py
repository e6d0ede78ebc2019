"""The commands of `winnow` for who runs the service. They read the settings of the environment, as API and workers do."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command()(migrate)
    app.command()(doctor)
    app.command()(collect)


def fail(message: str) -> NoReturn:
    print(f"winnow: {message}", file=sys.stderr)
    raise typer.Exit(1)


def settings_problem(error: ValueError) -> str:
    """What is wrong with which variable; never what it was set to."""
    if not isinstance(error, ValidationError):
        return str(error)
    wrong = [("__".join(str(part) for part in e["loc"]).upper(), e["msg"]) for e in error.errors()]
    return "; ".join(f"WINNOW_{name}: {message.removeprefix('Value error, ')}" for name, message in wrong)


def migrate() -> None:
    """Bring the database (WINNOW_DATABASE__URL) to this version."""
    from service.audit import service as audit
    from service.database import make_engine, make_sessions
    from service.schema import MigrationError, upgrade
    from service.settings import database_settings

    try:
        settings = database_settings()
    except ValueError as error:
        fail(settings_problem(error))
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
        engine = make_engine(settings)
        with make_sessions(engine).begin() as session:
            versions = {"before": before.current, "after": before.newest}
            audit.record_own(session, "cli", None, "database.migrated", "database", **versions)
        engine.dispose()
        print(f"The database went from {before.current or 'nothing'} to {before.newest}.")


def collect(
    dry_run: Annotated[bool, typer.Option(help="Remove nothing; say what would be removed")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Remove now what is too old or too much (WINNOW_RETENTION__*), and what nothing refers to; the API does it by itself."""
    from sqlalchemy.exc import DBAPIError

    import service.schema  # noqa: F401  # every table must be known before one is mapped to its foreign keys
    from service.artifacts import ArtifactStore
    from service.collection.service import collect
    from service.database import make_engine, make_sessions
    from service.settings import Settings

    try:
        settings = Settings()
    except ValidationError as error:
        fail(str(error))
    engine, store = make_engine(settings.database), ArtifactStore(settings.artifacts.url)
    try:
        found = collect(make_sessions(engine), store, settings.retention, dry_run=dry_run)
    except DBAPIError as error:
        fail(f"the database: {str(error.orig).strip()}. What was removed stays so; run it again.")
    finally:
        engine.dispose()
    if as_json:
        print(json.dumps({"dry_run": dry_run, **asdict(found)}))
        return
    print("Would remove:" if dry_run else "Removed:")
    for kind, tally in sorted(found.removed.items()):
        print(f"  {kind:<14} {tally.files:>9,} files {tally.bytes:>18,} bytes")
    counts = {"jobs": len(found.jobs), "workers": len(found.workers), "scratch": found.scratch}
    for name, count in counts.items():
        print(f"  {name:<14} {count:>9,}")
    if found.unknown.files:
        print(
            f"Left alone: {found.unknown.files:,} files of {found.unknown.bytes:,} bytes in the store that are not ours."
        )


def doctor(
    home: Annotated[Path | None, typer.Option(help="Look at the embedded stack that runs from this folder")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Look at every part that the service needs, and say what is wrong, why, and what to do. Exit status 1 if any fails."""
    from service.doctor import examine

    findings = examine(home)
    print(json.dumps([asdict(finding) for finding in findings], indent=2) if as_json else "\n".join(map(str, findings)))
    if any(finding.level == "FAIL" for finding in findings):
        raise typer.Exit(1)
