"""Workers that lack something: what they claim, and jobs that none of them can do."""

from typing import Any

import pytest
from sqlalchemy import text
from support.ledger_world import LEASE, LedgerWorld, unit

from service import ledger
from service.ledger import Claim, Lack, LeaseLost, store_identity
from service.ledger.store_identity import OtherStore
from service.ledger.workers import record_worker
from service.plan.stages import Stage
from service.storage.artifacts import ArtifactStore

MODEL = {"kind": "registered", "name": "none"}  # of the world's jobs
OF_MODEL, OF_ALL = {"problem": "It has no model.", "model": MODEL}, {"problem": "It has no store."}
AFTER = 100.0


def alive(world: LedgerWorld, worker: str, *lacks: dict[str, Any], seconds: float = AFTER + 1, **known: Any) -> None:
    with world.sessions.begin() as session:
        record_worker(session, worker, "1", lacks=[{"seconds": seconds, **lack} for lack in lacks], **known)


def claim(world: LedgerWorld, *without: Lack) -> Claim | None:
    with world.sessions.begin() as session:
        return ledger.claim_unit(session, worker_id="w", lease_seconds=LEASE, without=without)


def sweep(world: LedgerWorld) -> int:
    with world.sessions.begin() as session:
        return ledger.end_undoable(session, lease_seconds=LEASE, after_seconds=AFTER)


def old_job(world: LedgerWorld, *units: Any) -> str:
    """Posted longer ago than jobs wait."""
    job_id = world.job(*units)
    with world.engine.begin() as connection:
        age = text("UPDATE selection_jobs SET created_at = created_at - interval '1 hour' WHERE id = :id")
        connection.execute(age, {"id": job_id})
    return job_id


def test_a_worker_claims_nothing_that_it_lacks_and_looks_past_it(world: LedgerWorld) -> None:
    first, second = world.job(), world.job()
    assert claim(world, Lack(problem="", model=MODEL)) is None
    assert claim(world, Lack(problem="", job_id=first), Lack(problem="", job_id=second)) is None
    found = claim(world, Lack(problem="", model={**MODEL, "name": "other"}), Lack(problem="", job_id=first))
    assert found is not None
    assert found.job_id == second


@pytest.mark.parametrize("lack", [OF_MODEL, OF_ALL], ids=["model", "all"])
def test_a_job_that_no_live_worker_can_do_ends_as_a_failed_attempt_does(
    world: LedgerWorld, lack: dict[str, Any]
) -> None:
    job_id = old_job(world, unit(Stage.PREPARE), unit(Stage.WARMUP))
    alive(world, "a", lack)
    alive(world, "b", OF_MODEL)
    assert sweep(world) == 1
    job = world.row(job_id)
    assert (job.status.value, job.error["code"], job.error["stage"]) == ("failed", "no_able_worker", "prepare")  # type: ignore[index]
    assert lack["problem"] in job.error["detail"]  # type: ignore[index]
    assert world.states(job_id) == ["failed", "cancelled"]
    assert world.event_types(job_id) == [
        *("job.queued", "job.running", "unit.claimed", "unit.attempt_failed", "units.cancelled", "job.failed")
    ]
    assert sweep(world) == 0


def test_of_a_job_that_runs_what_was_done_stays_and_a_late_worker_is_fenced_off(world: LedgerWorld) -> None:
    job_id = old_job(world, unit(Stage.PREPARE), unit(Stage.WARMUP))
    assert world.finish(world.claim()) is False
    late = world.claim()
    alive(world, "a", OF_MODEL)
    assert sweep(world) == 0, "a unit is running"
    world.release(late)
    assert sweep(world) == 1
    assert world.states(job_id) == ["succeeded", "failed"]
    with pytest.raises(LeaseLost):
        world.finish(late)


def test_it_waits_while_a_worker_may_do_it_and_while_none_is_alive(world: LedgerWorld) -> None:
    job_id = old_job(world)
    assert sweep(world) == 0, "no worker"
    alive(world, "able")
    alive(world, "lacking", OF_ALL)
    assert sweep(world) == 0
    alive(world, "able", {"problem": "Of another.", "model": {**MODEL, "name": "other"}})
    alive(world, "able too", {"problem": "Of another.", "job_id": "job_other"})
    assert sweep(world) == 0
    alive(world, "able too", stopped=True)
    alive(world, "able", OF_MODEL, seconds=AFTER - 10)
    assert sweep(world) == 0, "not for long enough"
    assert world.status(job_id) == "queued"
    assert world.event_types(job_id) == ["job.queued", "job.waiting"]
    assert sweep(world) == 0
    assert world.event_types(job_id) == ["job.queued", "job.waiting"], "told once"
    alive(world, "able", {**OF_MODEL, "job_id": job_id})
    assert sweep(world) == 1


def test_a_job_just_posted_waits_however_long_its_workers_have_been_lacking(world: LedgerWorld) -> None:
    job_id = world.job()
    alive(world, "a", OF_ALL)
    assert sweep(world) == 0
    assert world.event_types(job_id)[-1] == "job.waiting"


@pytest.fixture
def unpaired(world: LedgerWorld) -> LedgerWorld:
    with world.engine.begin() as connection:
        connection.execute(text("DELETE FROM artifact_stores"))
    return world


def store(folder: Any) -> ArtifactStore:
    return ArtifactStore(str(folder))


def test_database_and_store_are_made_a_pair_once_and_told_from_others(unpaired: LedgerWorld, tmp_path: Any) -> None:
    first, other = store(tmp_path / "first"), store(tmp_path / "other")
    for _ in range(2):
        store_identity.establish(unpaired.sessions, first)
    with pytest.raises(OtherStore):
        store_identity.establish(unpaired.sessions, other)
    assert not (tmp_path / "other" / store_identity.MARKER).exists(), "another store was marked"
    with unpaired.sessions() as session:
        identity = store_identity.recorded(session)
    assert identity is not None
    store_identity.check(identity, first)
    for marked in ("", "store_other", "\0" * 1000):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / store_identity.MARKER).write_text(marked)
        with pytest.raises(OtherStore):
            store_identity.check(identity, other)


def test_a_pair_half_made_is_completed_and_a_restored_database_takes_the_mark_of_its_store(
    unpaired: LedgerWorld, tmp_path: Any
) -> None:
    with unpaired.engine.begin() as connection:
        connection.execute(text("INSERT INTO artifact_stores (id) VALUES ('store_half')"))
    store_identity.establish(unpaired.sessions, store(tmp_path))
    assert (tmp_path / store_identity.MARKER).read_text() == "store_half"
    with unpaired.engine.begin() as connection:
        connection.execute(text("DELETE FROM artifact_stores"))
    store_identity.establish(unpaired.sessions, store(tmp_path))
    with unpaired.sessions() as session:
        identity = store_identity.recorded(session)
    assert identity is not None
    assert (identity.id, identity.marked_at is not None) == ("store_half", True)
