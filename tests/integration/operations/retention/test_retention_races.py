"""A collection beside jobs that come and units that are created: what one has found stays, and neither waits for ever."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from support.ledger_world import at_once, create_job, wait_until
from support.retention_world import PATIENCE, Kept

from service.ids import new_id
from service.ledger.tables import SelectionJob
from service.plan.stages import Stage, UnitSpec
from service.retention import repository
from service.retention import service as collection


def before_each_batch(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    hold = repository.lock_artifacts

    def acting(session: Any) -> None:
        act()
        hold(session)

    monkeypatch.setattr(repository, "lock_artifacts", acting)


def test_a_job_that_came_after_the_listing_has_what_it_needs(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    key, other = kept.artifact(), kept.artifact()
    before_each_batch(monkeypatch, lambda: kept.job(key=key))
    kept.collect()
    assert kept.keys() == {key}
    assert not kept.store.exists(other)


def test_what_was_used_after_the_listing_stays(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    key, other = kept.artifact(), kept.artifact()
    before_each_batch(monkeypatch, lambda: kept.put(key, days=0))
    kept.collect()
    assert kept.keys() == {key}
    assert not kept.store.exists(other)


def test_units_that_are_created_in_the_midst_of_a_batch_wait_for_its_end(
    local: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = local.artifact()
    found_by_job: list[bool] = []

    def post() -> None:
        local.job(key=key)
        found_by_job.append(local.store.exists(key))

    poster = threading.Thread(target=post)
    delete = local.store.delete

    def deleting(key: str) -> None:
        poster.start()
        wait_until(lambda: waiting_locks(local) == 1, PATIENCE, "the job waits")
        delete(key)

    monkeypatch.setattr(local.store, "delete", deleting)
    local.collect()
    poster.join(PATIENCE)
    assert found_by_job == [False]  # it will be computed again


def waiting_locks(kept: Kept) -> int:
    with kept.ledger.engine.connect() as connection:
        query = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database WHERE NOT granted"
        return int(connection.scalar(text(f"{query} AND locktype = 'advisory' AND datname = current_database()")) or 0)


def test_whatever_jobs_come_while_batches_run_what_one_has_found_stays(
    local: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "_BATCH", 1)
    keys = [local.artifact() for _ in range(48)]
    found: dict[str, bool] = {}

    def post(mine: list[str]) -> None:
        for key in mine:
            local.job(key=key)
            found[key] = local.store.exists(key)

    outcomes = at_once([local.collect, *(lambda mine=keys[i::3]: post(mine) for i in range(2))])
    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert {key: local.store.exists(key) for key in found} == found
    assert len(found) == 32
    assert not any(local.store.exists(key) for key in keys[2::3])


def test_a_creation_that_does_not_end_stops_the_pass_and_not_the_other_way_round(local: Kept) -> None:
    key = local.artifact()
    with local.ledger.sessions() as session:
        job = SelectionJob(
            id=new_id("job"),
            status="queued",
            model={},
            budget=1,
            parameters={},
            request={},
            job_metadata={},
            **local.ledger.owner,
        )
        unit = UnitSpec(stage=Stage.SELECT, shard=0, artifact_key="selections", spec={}, total=1)
        create_job(session, job, [unit])
        with pytest.raises(OperationalError, match="lock timeout"):
            local.collect()
        session.rollback()
    assert local.keys() == {key}
    with local.ledger.sessions() as session:
        repository.lock_artifacts(session)
        assert session.scalar(text("SHOW lock_timeout")) == "2s", "jobs are to wait no longer than that"
    local.collect()
    assert local.keys() == set()
