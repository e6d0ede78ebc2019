"""Workers of two versions on one ledger, as in an upgrade: an artifact is made by the code that its name speaks of."""

import pytest
from sqlalchemy import text
from support.ledger_world import LEASE, LedgerWorld, unit

from service import ledger
from service.ledger import Claim
from service.ledger.tables import SelectionJob
from service.ledger.workers import record_worker
from service.plan.stages import Stage


def alive(world: LedgerWorld, version: str, *, stopped: bool = False) -> None:
    with world.sessions.begin() as session:
        record_worker(session, f"worker-{version}", version, stopped=stopped)


def claim(world: LedgerWorld, code: str) -> Claim | None:
    with world.sessions.begin() as session:
        return ledger.claim_unit(session, worker_id=f"worker-{code}", lease_seconds=LEASE, code=code)


@pytest.fixture
def planned_by_new(world: LedgerWorld) -> str:
    """A job whose first unit is done, and whose next one a worker of the version `new` has planned."""
    alive(world, "old")
    alive(world, "new")
    job_id = world.job()
    done = claim(world, "new")
    assert done is not None
    assert world.finish(done)
    with world.sessions.begin() as session:
        ledger.start_stages(session, session.get_one(SelectionJob, job_id), [unit(Stage.EMBED)], code="new")
    return job_id


def test_what_the_api_creates_is_anyones(world: LedgerWorld) -> None:
    alive(world, "old")
    alive(world, "new")
    world.job()
    world.job()
    assert claim(world, "old") is not None
    assert claim(world, "new") is not None


@pytest.mark.usefixtures("planned_by_new")
def test_a_unit_is_done_by_the_version_that_planned_it(world: LedgerWorld) -> None:
    assert claim(world, "old") is None
    found = claim(world, "new")
    assert found is not None
    assert found.stage is Stage.EMBED


@pytest.mark.usefixtures("planned_by_new")
def test_once_its_version_has_ended_it_is_anyones(world: LedgerWorld) -> None:
    alive(world, "new", stopped=True)
    assert claim(world, "old") is not None


@pytest.mark.usefixtures("planned_by_new")
def test_once_its_version_was_not_seen_for_a_lease_it_is_anyones(world: LedgerWorld) -> None:
    with world.engine.begin() as connection:
        seen = "UPDATE workers SET seen_at = now() - make_interval(secs => :ago) WHERE version = 'new'"
        connection.execute(text(seen), {"ago": LEASE - 20})
        assert claim(world, "old") is None
    with world.engine.begin() as connection:
        connection.execute(text(seen), {"ago": LEASE + 1})
    assert claim(world, "old") is not None


def test_it_looks_past_such_a_unit_to_the_next_job(world: LedgerWorld, planned_by_new: str) -> None:
    other = world.job()
    found = claim(world, "old")
    assert found is not None
    assert found.job_id == other != planned_by_new
