"""Retention by itself, in the API's process, and by command."""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from support.ledger_world import LedgerWorld, ledger_world, wait_until
from support.retention_world import PATIENCE, Kept, empty
from support.world import make_settings

from service.background.sweeper import Sweeper
from service.db.locks import Lock
from service.settings import (
    RetentionSettings,
)

SOON = RetentionSettings(sweep_minutes=0.0005)
LOCK = f"SELECT pg_try_advisory_lock({Lock.SWEEPER.value})"


@pytest.fixture(scope="module")
def _database(postgres_url: str) -> Iterator[LedgerWorld]:
    with ledger_world(postgres_url) as world:
        yield world


@pytest.fixture
def local(_database: LedgerWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # no scratch of others
    return empty(_database, str(tmp_path / "store"))


@contextmanager
def sweeping(kept: Kept, retention: RetentionSettings = SOON) -> Iterator[Sweeper]:
    groups = {"artifacts": {"url": kept.store.url}, "models": {"folder": Path()}, "retention": retention}
    settings = make_settings(kept.ledger.url, Path(), **groups)
    started = Sweeper(settings, kept.store)
    started.start()
    try:
        yield started
    finally:
        started.stop()
        assert not started._thread.is_alive()


def test_the_sweeper_collects_again_and_again(local: Kept) -> None:
    with sweeping(local):
        for _ in range(2):
            local.artifact()
            wait_until(lambda: not local.keys(), PATIENCE, "it is collected")


def test_one_sweeper_leads_and_another_takes_over(local: Kept) -> None:
    with psycopg.connect(local.ledger.url, autocommit=True) as leader:
        assert leader.execute(LOCK).fetchone() == (True,)
        with sweeping(local):
            local.artifact()
            wait_to_be_tried(local)
            assert len(local.keys()) == 1
            leader.close()
            wait_until(lambda: not local.keys(), PATIENCE, "it leads")


def tried_at(kept: Kept) -> datetime | None:
    """When a sweeper that does not lead last tried to."""
    query = "SELECT query_start FROM pg_stat_activity WHERE query = 'SELECT pg_try_advisory_lock($1)'"
    with kept.ledger.engine.connect() as connection:
        return connection.scalar(text(f"{query} AND datname = current_database()"))


def wait_to_be_tried(kept: Kept) -> None:
    """Until it has tried in vain; a pass that was under way before is over then."""
    for _ in range(2):
        before = tried_at(kept)
        wait_until(lambda before=before: tried_at(kept) not in (before, None), PATIENCE, "it tries to lead")


def test_the_lock_goes_with_the_sweeper(local: Kept) -> None:
    with sweeping(local), psycopg.connect(local.ledger.url, autocommit=True) as other:
        wait_until(lambda: not is_free(other), PATIENCE, "it leads")
    with psycopg.connect(local.ledger.url, autocommit=True) as other:
        wait_until(lambda: is_free(other), PATIENCE, "the lock is given back")


def is_free(connection: psycopg.Connection) -> bool:
    free = connection.execute(LOCK).fetchone() == (True,)
    connection.execute("SELECT pg_advisory_unlock_all()")
    return free


def test_a_pass_that_fails_is_tried_again(
    local: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = local.store.files
    failures = iter([OSError("the store is away"), RuntimeError("a fault of ours")])

    def failing() -> Iterator[Any]:
        if error := next(failures, None):
            raise error
        return files()

    monkeypatch.setattr(local.store, "files", failing)
    key = local.artifact()
    with sweeping(local):
        wait_until(lambda: not local.store.exists(key), PATIENCE, "it is collected")
    assert caplog.text.count("the pass failed") == 2


def test_who_loses_its_connection_leads_no_longer_and_may_lead_again(local: Kept) -> None:
    with sweeping(local):
        local.artifact()
        wait_until(lambda: not local.keys(), PATIENCE, "it is collected")
        with psycopg.connect(local.ledger.url, autocommit=True) as other:

            def takes_over() -> bool:
                other.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid()"
                )
                return other.execute(LOCK).fetchone() == (True,)

            wait_until(takes_over, PATIENCE, "another leads")
            wait_to_be_tried(local)
            local.artifact()
            wait_to_be_tried(local)
            assert len(local.keys()) == 1
        wait_until(lambda: not local.keys(), PATIENCE, "it is collected again")


def test_the_sweeper_stops_in_the_midst_of_a_listing(local: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    local.artifact()
    (file,) = local.store.files()
    listing = threading.Event()

    def endless() -> Iterator[Any]:
        while True:
            listing.set()
            yield file

    monkeypatch.setattr(local.store, "files", endless)
    with sweeping(local):
        assert listing.wait(PATIENCE)


def winnow_collect(kept: Kept, *options: str) -> str:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("WINNOW_")},
        "TMPDIR": tempfile.gettempdir(),
        "WINNOW_DATABASE__URL": kept.ledger.url,
        "WINNOW_BROKER__URL": "redis://127.0.0.1:1/0",
        "WINNOW_ARTIFACTS__URL": kept.store.url,
        "WINNOW_MODELS__FOLDER": kept.store.url,
    }
    command = [sys.executable, "-c", "from winnow.cli.main import main; main()", "collect", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_says_what_goes_and_what_went(local: Kept) -> None:
    local.artifact(size=1234)
    local.put("notes.txt", size=7)
    said = json.loads(winnow_collect(local, "--dry-run", "--json"))
    assert said == {
        "dry_run": True,
        "removed": {"gradients": {"files": 1, "bytes": 1234}},
        "jobs": [],
        "uploads": [],
        "workers": [],
        "scratch": 0,
        "unknown": {"files": 1, "bytes": 7},
    }
    assert len(local.keys()) == 2
    told = winnow_collect(local)
    assert re.search(r"gradients +1 files +1,234 bytes", told)
    assert "1 files of 7 bytes" in told
    assert local.keys() == {"notes.txt"}
