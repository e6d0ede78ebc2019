"""How a migration runs: it gives way to everyone, is tried again, and says why where it cannot."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from alembic import command
from sqlalchemy import Connection, Engine, create_engine, make_url, text
from support.later_migrations import FIRST, later_version
from support.ledger_world import new_database, wait_until
from typer.testing import CliRunner

from service.db.migrate import MigrationError, alembic_config, migrating, upgrade
from service.ids import new_id
from service.settings import DatabaseSettings
from winnow.cli.main import app


def revision_of(engine: Engine) -> str | None:
    with engine.connect() as connection:
        return connection.scalar(text("SELECT version_num FROM alembic_version"))


@contextmanager
def reading(engine: Engine, table: str) -> Iterator[Connection]:
    """A transaction that has read the table, and so stands in the way of altering it, until it is ended."""
    with engine.connect() as connection:
        connection.execute(text(f"SELECT * FROM {table}"))
        yield connection


@pytest.fixture
def later(postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Engine]]:
    """A database of this version, and the migrations of a later one, which wait for locks only a moment."""
    monkeypatch.setattr("service.db.migrate._LOCK_SECONDS", 0.2)
    monkeypatch.setattr("service.db.migrate._PAUSE_SECONDS", (0.05,))
    with new_database(postgres_url) as url, later_version(tmp_path / "migrations"):
        engine = create_engine(DatabaseSettings(url=url).url)
        yield url, engine
        engine.dispose()


def test_a_migration_gives_way_to_a_long_query_and_leaves_the_ones_before_it_done(later: tuple[str, Engine]) -> None:
    url, engine = later
    reasons: list[str] = []
    gave_up = r"gave up after 1 attempts: no lock for `ALTER TABLE job_units .*session"
    with reading(engine, "job_units"), pytest.raises(MigrationError, match=gave_up):
        upgrade(url, patience_seconds=0, notify=reasons.append)
    assert (revision_of(engine), reasons) == ("later_1", [])
    upgrade(url, notify=reasons.append)
    assert (revision_of(engine), reasons) == ("later_2", [])


@pytest.mark.parametrize("table", ["job_units", "selection_jobs"])
def test_a_migration_is_tried_again_until_it_has_its_locks(later: tuple[str, Engine], table: str) -> None:
    url, engine = later
    reasons: list[str] = []
    with reading(engine, table) as reader:
        session = reader.scalar(text("SELECT pg_backend_pid()"))

        def notify(reason: str) -> None:
            reasons.append(reason)
            if len(reasons) == 3:
                reader.rollback()

        before = upgrade(url, notify=notify)
    assert (before.current, before.newest, revision_of(engine), len(reasons)) == (FIRST, "later_2", "later_2", 3)
    assert f"ALTER TABLE {table}" in reasons[0]
    assert f"session {session} " in reasons[0]


def test_an_error_that_is_not_about_locks_is_raised_at_once(later: tuple[str, Engine]) -> None:
    url, engine = later
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE later ()"))
    reasons: list[str] = []
    with pytest.raises(MigrationError, match=r'^a migration failed: relation "later" already exists$'):
        upgrade(url, notify=reasons.append)
    assert (revision_of(engine), reasons) == (FIRST, [])
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE later"))
    upgrade(url)  # from what the failed one has left
    assert revision_of(engine) == "later_2"


def test_a_waiting_migration_holds_no_table_that_a_request_may_need(
    later: tuple[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, engine = later
    monkeypatch.setattr("service.db.migrate._LOCK_SECONDS", 60)
    waits = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'selection_jobs'::regclass")
    with reading(engine, "selection_jobs") as reader, ThreadPoolExecutor(1) as pool:
        migration = pool.submit(upgrade, url)
        wait_until(lambda: reader.scalar(waits), 60, "the migration waits")
        # Had it both tables in one transaction, each would wait for the other now.
        reader.execute(text("LOCK TABLE job_units IN ROW EXCLUSIVE MODE NOWAIT"))
        reader.rollback()
        migration.result()
    assert revision_of(engine) == "later_2"


def test_one_migration_at_a_time_in_a_database(postgres_url: str) -> None:
    with new_database(postgres_url) as url, new_database(postgres_url) as other, migrating(url) as connection:
        session = connection.scalar(text("SELECT pg_backend_pid()"))
        refused = rf"^another migration runs: session {session} \(user postgres, winnow-migrate, from this host\) holds"
        with pytest.raises(MigrationError, match=refused):
            upgrade(url)
        with pytest.raises(MigrationError, match=refused):
            command.downgrade(alembic_config(url), "base")
        upgrade(other)
        result = CliRunner().invoke(app, ["migrate"], env={"WINNOW_DATABASE__URL": url})
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("winnow: another migration runs: session")
    upgrade_again = CliRunner().invoke(app, ["migrate"], env={"WINNOW_DATABASE__URL": postgres_url})
    assert (upgrade_again.exit_code, upgrade_again.stdout) == (0, f"The database is already at {FIRST}.\n")


def test_a_database_that_cannot_hold_every_character_is_refused(postgres_url: str) -> None:
    name = new_id("test")
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(
            f"CREATE DATABASE {name} ENCODING SQL_ASCII TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'".encode()
        )
        try:
            with pytest.raises(MigrationError, match=r"SQL_ASCII.*ENCODING 'UTF8'"):
                upgrade(make_url(postgres_url).set(database=name).render_as_string(hide_password=False))
        finally:
            server.execute(f"DROP DATABASE {name}".encode())


def test_the_command_says_from_where_to_where_and_what_went_wrong(postgres_url: str) -> None:
    def migrate(url: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, ["migrate"], env={"WINNOW_DATABASE__URL": url})
        return result.exit_code, result.stdout, result.stderr

    with new_database(postgres_url, migrated=False) as url:
        assert migrate(url) == (0, f"Migrated the database from nothing to {FIRST}.\n", "")
        engine = create_engine(DatabaseSettings(url=url).url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        later = f"The database is at 9999, from a later version than this one, which knows up to {FIRST}.\n"
        assert migrate(url) == (0, later, "")
        assert revision_of(engine) == "9999"
        with engine.begin() as connection:  # the last of the migrations that became one
            connection.execute(text("UPDATE alembic_version SET version_num = '0004'"))
        assert migrate(url)[:2] == (1, "")
        assert revision_of(engine) == "0004"
        engine.dispose()
    status, stdout, stderr = migrate("postgresql://nobody:hunter2@127.0.0.1:1/none")
    assert (status, stdout, stderr.count("\n"), "hunter2" in stderr) == (1, "", 1, False)
    assert stderr.startswith("winnow: the database does not answer: ")
    assert migrate("mysql://x")[2].startswith("winnow: WINNOW_DATABASE__URL: must be a postgresql:// URL")
