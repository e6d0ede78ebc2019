"""The budget of database connections is what the parts of a process may open, and what does not fit is said at the start."""

import logging
from pathlib import Path
from typing import Any

import pytest
from support.world import World, make_settings

from service.db import budget, engine
from service.db.loop import BackgroundLoop
from service.health.connections import warn_at_start
from service.settings import ApiSettings
from service.shares import READS, WRITES
from worker.supervisor import Supervisor


class Opened:
    """What engines and loops that are made from here on may open."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.most = 0
        create, start = engine.create_engine, BackgroundLoop.start

        def create_engine(*arguments: Any, **options: Any) -> Any:
            self.most += options["pool_size"] + options["max_overflow"]
            return create(*arguments, **options)

        def start_loop(loop: BackgroundLoop) -> None:
            self.most += 1
            start(loop)

        patch.setattr(engine, "create_engine", create_engine)
        patch.setattr(BackgroundLoop, "start", start_loop)


@pytest.mark.parametrize("pool_size", [2, 5])
def test_the_budget_of_an_api_process_is_what_it_may_open(
    postgres_url: str, broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool_size: int
) -> None:
    settings = make_settings(postgres_url, tmp_path, broker_url=broker_url, pool_size=pool_size)
    opened = Opened(monkeypatch)
    with World.made(settings, runs=True):
        assert opened.most + READS + WRITES == budget.of_api_process(settings.database)


def test_the_budget_of_a_worker_is_what_it_may_open(settings: ApiSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened(monkeypatch)
    supervisor = Supervisor(settings)
    assert opened.most == budget.of_worker(settings.database)
    supervisor._engine.dispose()


def test_what_does_not_fit_is_said_at_the_start(settings: ApiSettings, caplog: pytest.LogCaptureFixture) -> None:
    warn_at_start(settings, 1)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        warn_at_start(settings, 100)
    (record,) = caplog.records
    wanted = 100 * budget.of_api_process(settings.database)
    assert any(isinstance(part, str) and "max_connections" in part for part in record.args)
    assert str(wanted // 1000) in record.getMessage()


def test_a_database_that_is_away_is_no_reason_not_to_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_at_start(make_settings("postgresql://nobody@127.0.0.1:1/none", tmp_path), 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
