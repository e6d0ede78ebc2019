"""The place in the queue against what workers really claim, and the estimate of a start against figures done by hand."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from support.ledger_world import LEASE, LedgerWorld, new_owner, unit

from service import ledger
from service.jobs import queue
from service.jobs.queue import NoEstimate, QueuePlace, place
from service.ledger.tables import SelectionJob
from service.ledger.workers import record_worker
from service.plan.stages import Stage
from service.settings import LedgerSettings

Owner = dict[str, str]
STAGES = {"prepare": 40.0, "embed": 60.0}


@pytest.fixture
def two(world: LedgerWorld) -> tuple[Owner, Owner]:
    return new_owner(world.sessions), new_owner(world.sessions)


def alive(world: LedgerWorld, *names: str, lacks: list[dict[str, Any]] | None = None) -> None:
    with world.sessions.begin() as session:
        for name in names:
            record_worker(session, name, "v", lacks=lacks or [])


def plan(world: LedgerWorld, job_id: str, stages: dict[str, float] | dict[str, float | None]) -> str:
    entries = [{"stage": stage, "seconds": seconds} for stage, seconds in stages.items()]
    with world.sessions.begin() as session:
        ledger.add_plan(session, session.get_one(SelectionJob, job_id), {"stages": entries})
    return job_id


def waiting(world: LedgerWorld, owner: Owner | None = None, seconds: float | None = 100.0) -> str:
    return plan(world, world.job(owner=owner), {"prepare": seconds})


def seen(world: LedgerWorld, job_id: str, turn_seconds: float = 0) -> QueuePlace:
    with world.sessions() as session:
        settings = LedgerSettings(lease_seconds=LEASE, turn_seconds=turn_seconds)
        return place(session, settings, session.get_one(SelectionJob, job_id))


def seconds_until(found: QueuePlace) -> float:
    assert found.starts_at is not None, found
    return (found.starts_at - found.as_of).total_seconds()


def running_for(world: LedgerWorld, claim: ledger.Claim, seconds: float, done: int) -> None:
    world.beat(claim, done=done)
    with world.engine.begin() as connection:
        began = datetime.now(UTC) - timedelta(seconds=seconds)
        connection.execute(
            text("UPDATE job_units SET started_at = :began WHERE id = :id"), {"began": began, "id": claim.unit_id}
        )


def test_a_job_starts_when_the_work_before_it_is_done(world: LedgerWorld) -> None:
    alive(world, "w")
    first = plan(world, world.job(), STAGES)
    claim = world.claim("w")
    running_for(world, claim, 30, done=50)
    second, third = plan(world, world.job(), STAGES), plan(world, world.job(), STAGES)
    left = STAGES["prepare"] / 2 + STAGES["embed"]
    for job_id, before, seconds in ((second, 0, left), (third, 1, left + 100)):
        found = seen(world, job_id)
        assert (found.own_jobs_before, found.jobs_before, found.workers, found.no_estimate) == (before, before, 1, None)
        assert seconds_until(found) == pytest.approx(seconds, abs=0.1)
    alive(world, "v")
    assert seconds_until(seen(world, second)) == 0, "a worker is idle"
    assert seconds_until(seen(world, third)) == pytest.approx((left + 100) / 2, abs=0.1)
    found = seen(world, first)
    assert (found.own_jobs_before, found.jobs_before, found.starts_at) == (None, None, None)
    assert found.no_estimate == NoEstimate.NOT_QUEUED


def test_a_tenant_beside_gets_as_much_done_and_no_more_than_it_has(
    world: LedgerWorld, two: tuple[Owner, Owner]
) -> None:
    alive(world, "w")
    plan(world, world.job(owner=two[0]), {"prepare": 0.0})
    running_for(world, world.claim("w"), 10, done=100)  # of the first tenant, so that the other one comes before it
    own, others = [waiting(world, two[0]) for _ in range(3)], [waiting(world, two[1], 30.0) for _ in range(4)]
    found = [seen(world, job_id) for job_id in own]
    assert [each.own_jobs_before for each in found] == [0, 1, 2]
    assert [each.jobs_before for each in found] == [1, 1 + 4, 2 + 4]
    assert seconds_until(found[1]) == pytest.approx(100 + 100, abs=0.1)
    assert seconds_until(found[2]) == pytest.approx(200 + 120, abs=0.1)
    in_turns = seen(world, own[0], turn_seconds=60)
    assert (in_turns.jobs_before, seconds_until(in_turns)) == (3, 60), "of the other's turn"
    assert [seen(world, job_id).jobs_before for job_id in others] == [0, 2, 3, 4]


def test_the_places_are_the_order_in_which_workers_claim(world: LedgerWorld) -> None:
    owners = [new_owner(world.sessions) for _ in range(3)]
    alive(world, "w")
    jobs = [waiting(world, owners[number]) for number in (0, 0, 1, 0, 2, 1, 0, 2, 0)]
    with world.sessions.begin() as session:  # as if each had had a turn before
        for number, owner in enumerate(owners):
            at = text("UPDATE tenants SET last_scheduled_at = now() - make_interval(secs => :ago) WHERE id = :id")
            session.execute(at, {"ago": 100 + number, "id": owner["tenant_id"]})
    places = {job_id: seen(world, job_id).jobs_before for job_id in jobs}
    assert sorted(place for place in places.values() if place is not None) == list(range(len(jobs)))
    claimed = []
    for _ in jobs:
        claim = claim_next(world)
        claimed.append(claim.job_id)
        world.finish(claim)
    assert [places[job_id] for job_id in claimed] == list(range(len(jobs)))


def claim_next(world: LedgerWorld) -> ledger.Claim:
    with world.sessions.begin() as session:
        claim = ledger.claim_unit(session, worker_id="w", lease_seconds=LEASE, turn_seconds=0)
    assert claim is not None
    return claim


def test_nothing_is_estimated_from_what_is_not_known(world: LedgerWorld, two: tuple[Owner, Owner]) -> None:
    vague, job_id = waiting(world, two[0], seconds=None), waiting(world, two[0])
    assert (seen(world, job_id).workers, seen(world, job_id).no_estimate) == (0, NoEstimate.NO_WORKER)
    alive(world, "w", lacks=[{"problem": "no model", "model": {"kind": "registered", "name": "none"}, "seconds": 1}])
    assert (seen(world, job_id).workers, seen(world, job_id).no_estimate) == (0, NoEstimate.NO_WORKER)
    alive(world, "w", lacks=[{"problem": "no other", "model": {"kind": "registered", "name": "other"}, "seconds": 1}])
    found = seen(world, job_id)
    assert (found.own_jobs_before, found.jobs_before, found.workers) == (1, None, 1)
    assert (found.starts_at, found.no_estimate) == (None, NoEstimate.NO_RATE)
    plan(world, vague, {"prepare": 100.0})
    assert seconds_until(seen(world, job_id)) == pytest.approx(100)
    other = waiting(world, two[1], seconds=None)
    assert seen(world, job_id).no_estimate == NoEstimate.NO_RATE, "the other tenant is scheduled, too"
    with world.sessions.begin() as session:
        session.get_one(SelectionJob, other).awaits_datasets = True
    found = seen(world, other)
    assert (found.own_jobs_before, found.no_estimate) == (None, NoEstimate.IMPORTING)
    assert seconds_until(seen(world, job_id)) == pytest.approx(100), "what waits for an import is not in the queue"


def test_of_a_long_queue_only_the_own_jobs_are_counted(
    world: LedgerWorld, two: tuple[Owner, Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An estimate reads every job that has not ended."""
    alive(world, "w")
    jobs = [waiting(world, two[number]) for number in (0, 1, 0, 0)]
    known = seen(world, jobs[-1])
    monkeypatch.setattr(queue, "_MOST_OPEN", 4)
    assert seen(world, jobs[-1]).no_estimate is None, "as many as that are still estimated"
    monkeypatch.setattr(queue, "_MOST_OPEN", 3)
    found = seen(world, jobs[-1])
    assert (found.starts_at, found.jobs_before, found.no_estimate) == (None, None, NoEstimate.LONG_QUEUE)
    assert (found.own_jobs_before, found.workers) == (known.own_jobs_before, known.workers) == (2, 1)
    world.finish(claim_next(world))
    assert seen(world, jobs[0]).no_estimate == NoEstimate.NOT_QUEUED


def test_a_job_waits_for_the_artifact_that_another_unit_makes(world: LedgerWorld, two: tuple[Owner, Owner]) -> None:
    alive(world, "w", "v")
    same = unit(Stage.PREPARE)
    plan(world, world.job(same, owner=two[0]), {"prepare": 100.0})
    claim = world.claim("w")
    job_id = plan(world, world.job(unit(Stage.PREPARE, key=same.artifact_key), owner=two[1]), {"prepare": 100.0})
    assert seconds_until(seen(world, job_id)) == pytest.approx(100, abs=1)
    running_for(world, claim, 30, done=75)
    assert seconds_until(seen(world, job_id)) == pytest.approx(10, abs=0.1)
