"""How units and jobs end, and the events that say so."""

import random
from functools import partial
from itertools import pairwise

import pytest
from sqlalchemy import text
from support.ledger_model import JOB_TRANSITIONS
from support.ledger_world import ENDINGS, LedgerWorld, at_once, unit

from service.ledger import Claim, LeaseLost, Retries
from service.ledger.state import JobStatus
from service.plan.stages import Stage


def test_a_finished_unit_has_its_result_its_full_progress_and_no_lease(world: LedgerWorld) -> None:
    world.job(unit(Stage.EMBED, total=50))
    claim = world.claim()
    world.beat(claim, 20)
    world.finish(claim, {"rows": 50})
    row = world.unit(claim)
    assert (row.state, row.result, row.progress_done, row.lease_expires_at) == ("succeeded", {"rows": 50}, 50, None)
    assert row.finished_at is not None


def test_a_group_is_complete_with_its_last_unit_and_only_then(world: LedgerWorld) -> None:
    world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1), unit(Stage.LANDMARK_GRADIENTS), unit(Stage.TARGET_GRADIENTS))
    claims = [world.claim() for _ in range(4)]
    assert [world.finish(claim) for claim in reversed(claims)] == [False, False, False, True]


def test_of_units_that_finish_at_once_exactly_one_completes_the_group(world: LedgerWorld) -> None:
    for _ in range(8):
        world.empty()
        job_id = world.job(*(unit(Stage.EMBED, shard) for shard in range(5)), unit(Stage.TARGET_GRADIENTS))
        claims = [world.claim() for _ in range(6)]
        outcomes = at_once([partial(world.finish, claim) for claim in claims])
        assert sorted(map(str, outcomes)) == ["False"] * 5 + ["True"]
        assert world.states(job_id) == ["succeeded"] * 6


def test_only_one_of_two_that_finish_the_same_unit_is_heard(world: LedgerWorld) -> None:
    for _ in range(5):
        world.empty()
        job_id = world.job()
        claim = world.claim()
        outcomes = at_once([partial(world.finish, claim)] * 2)
        assert sorted(type(outcome) for outcome in outcomes if outcome is not True) == [LeaseLost]
        assert world.event_types(job_id).count("unit.succeeded") == 1


def test_a_job_goes_through_its_stages_to_its_end(world: LedgerWorld) -> None:
    job_id = world.job()
    for following in ([Stage.EMBED, Stage.LANDMARK_GRADIENTS], [Stage.PROPAGATE], [Stage.SELECT], [Stage.VALIDATE], []):
        claims: list[Claim] = []
        while (claim := world.try_claim()) is not None:
            claims.append(claim)
        complete = [world.finish(claim) for claim in claims]
        assert complete == [False] * (len(claims) - 1) + [True]
        if following:
            world.start(job_id, *(unit(stage) for stage in following))
    job = world.row(job_id)
    assert job.status is JobStatus.SUCCEEDED
    assert job.finished_at is not None
    assert set(world.states(job_id)) == {"succeeded"}
    assert world.event_types(job_id)[-2:] == ["unit.succeeded", "job.succeeded"]
    started = [data for kind, data in world.events(job_id) if kind == "stages.started"]
    assert started[0] == {"stages": ["embed", "landmark_gradients"], "units": 2}


def test_a_failure_that_can_pass_is_tried_again_with_its_error_kept(world: LedgerWorld) -> None:
    job_id = world.job()
    claim = world.claim()
    assert world.fail(claim, retryable=True) is True
    row = world.unit(claim)
    assert (row.state, row.failures) == ("pending", 1)
    assert row.error == {"code": "broken", "detail": "It is broken."}
    assert world.status(job_id) == "running"
    again = world.claim()
    assert (again.unit_id, again.attempt) == (claim.unit_id, 2)
    assert world.finish(again) is True


def test_a_failure_for_good_fails_the_job_and_cancels_its_other_units(world: LedgerWorld) -> None:
    job_id = world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1), unit(Stage.EMBED, 2), unit(Stage.EMBED_TARGET))
    done, culprit, _running = world.claim(), world.claim(), world.claim()
    world.finish(done)
    assert world.fail(culprit, retryable=False) is False
    assert world.states(job_id) == ["succeeded", "failed", "cancelled", "cancelled"]
    job = world.row(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error == {
        "code": "broken",
        "detail": "It is broken.",
        "stage": "embed",
        "shard": 1,
        "attempts": 1,
        "history": [{"attempt": 1, "code": "broken", "detail": "It is broken."}],
    }
    assert world.events(job_id)[-2:] == [
        ("units.cancelled", {"stages": ["embed", "embed_target"], "units": 2}),
        ("job.failed", {"error": job.error}),
    ]


def test_a_release_costs_no_try(world: LedgerWorld) -> None:
    job_id = world.job()
    for attempt in range(1, 6):
        claim = world.claim()
        assert claim.attempt == attempt
        world.release(claim)
    row = world.unit(claim)
    assert (row.state, row.failures) == ("pending", 0)
    claim = world.claim()
    assert world.fail(claim, retryable=True, retries=Retries(max_attempts=2, seconds=0)) is True
    assert world.status(job_id) == "running"
    assert world.event_types(job_id).count("unit.released") == 5


def made_and_read(world: LedgerWorld) -> tuple[str, Claim, Claim]:
    """A job, the claim of a unit that has made `e`, and of one that reads it."""
    job_id = world.job(unit(Stage.EMBED, key="e"), unit(Stage.LANDMARK_GRADIENTS, key="g"))
    claims = [world.claim() for _ in range(2)]
    for claim in claims:
        world.finish(claim, {"files": [{"key": f"{claim.artifact_key}.also"}]}, then=[unit(Stage.PROPAGATE, total=9)])
    maker = next(claim for claim in claims if claim.stage is Stage.EMBED)
    return job_id, maker, world.claim()


@pytest.mark.parametrize("key", ["e", "e.json", "e.also"])
def test_who_made_what_is_damaged_makes_it_again_before_its_reader_goes_on(world: LedgerWorld, key: str) -> None:
    """Nothing of this counts as a failure of either; two readers have it made once."""
    job_id, maker, reader = made_and_read(world)
    world.lack(reader, key)
    assert world.states(job_id).count("pending") == 2
    assert world.claimable_count() == 1
    again = world.claim()
    assert (again.unit_id, again.attempt) == (maker.unit_id, 2)
    assert world.try_claim() is None, "the reader waits"
    assert world.unit(maker).result is not None, "other units need it meanwhile"
    assert world.finish(again, {"files": []}) is False
    once_more = world.claim()
    assert (once_more.unit_id, once_more.attempt) == (reader.unit_id, 2)
    assert world.finish(once_more) is True
    assert [row.failures for row in world.units(job_id)] == [0, 0, 0]
    kinds = [kind for kind, _ in world.events(job_id)]
    assert (kinds.count("unit.reopened"), kinds.count("unit.released")) == (1, 1)


def test_what_is_damaged_whenever_it_is_made_fails_the_job(world: LedgerWorld) -> None:
    retries = Retries(max_attempts=2, seconds=0)
    job_id, _, reader = made_and_read(world)
    world.lack(reader, "e", retries)
    world.finish(world.claim())
    world.lack(world.claim(), "e", retries)
    job = world.row(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["artifact"], job.error["stage"]) == ("artifact_damaged", "e", "propagate")


def test_what_no_unit_of_the_job_makes_fails_it_at_once(world: LedgerWorld) -> None:
    job_id, _, reader = made_and_read(world)
    world.lack(reader, "datasets/00/x/rows.parquet")
    assert world.status(job_id) == "failed"


def test_a_job_that_waits_for_an_artifact_can_be_cancelled(world: LedgerWorld) -> None:
    job_id, _, reader = made_and_read(world)
    world.lack(reader, "e")
    world.cancel(job_id)
    assert world.status(job_id) == "cancelled"
    assert world.try_claim() is None


def test_progress_starts_anew_with_each_attempt(world: LedgerWorld) -> None:
    world.job(unit(Stage.EMBED, total=10))
    claim = world.claim()
    world.beat(claim, 8)
    world.release(claim)
    assert world.unit(world.claim()).progress_done == 0


def test_a_running_unit_tells_of_itself_and_one_that_lost_its_lease_is_not_heard(world: LedgerWorld) -> None:
    job_id = world.job(unit(Stage.WARMUP))
    claim = world.claim()
    world.tell(claim, "warmup.step", {"step": 3, "loss": 1.5})
    assert world.events(job_id)[-1] == ("warmup.step", {"stage": "warmup", "shard": 0, "step": 3, "loss": 1.5})
    world.release(claim)
    before = world.image()
    with pytest.raises(LeaseLost):
        world.tell(claim, "warmup.step", {"step": 4, "loss": 1.4})
    assert world.image() == before


def test_every_change_has_its_event_in_order(world: LedgerWorld) -> None:
    job_id = world.job()
    world.release(world.claim("a"))
    world.fail(world.claim("b"), retryable=True)
    claim = world.claim("c")
    world.cancel(job_id)
    world.release(claim)
    assert world.event_types(job_id) == [
        "job.queued",
        "job.running",
        "unit.claimed",
        "unit.released",
        "unit.claimed",
        "unit.attempt_failed",
        "unit.claimed",
        "job.cancelling",
        "unit.cancelled",
        "job.cancelled",
    ]
    claimed = [data for kind, data in world.events(job_id) if kind == "unit.claimed"]
    assert [(data["worker_id"], data["attempt"], data["stage"]) for data in claimed] == [
        ("a", 1, "prepare"),
        ("b", 2, "prepare"),
        ("c", 3, "prepare"),
    ]


def test_the_events_of_every_history_are_a_walk_along_the_transitions(world: LedgerWorld) -> None:
    """Random histories of one job: its `job.*` events are exactly the states it went through."""
    chance = random.Random(5)
    for _ in range(25):
        world.empty()
        job_id = world.job(unit(Stage.VALIDATE))
        steps = [*ENDINGS.values(), lambda world, claim: world.cancel(claim.job_id)]
        for _ in range(6):
            claim = world.try_claim()
            if claim is None:
                break
            chance.choice(steps)(world, claim)
            if chance.random() < 0.2:
                world.cancel(job_id)
        states = [JobStatus(kind.removeprefix("job.")) for kind in world.event_types(job_id) if kind.startswith("job.")]
        assert states[0] is JobStatus.QUEUED
        assert states[-1] is world.row(job_id).status
        assert set(pairwise(states)) <= JOB_TRANSITIONS


def test_an_event_that_cannot_be_written_undoes_the_change(world: LedgerWorld) -> None:
    job_id = world.job()
    before = world.image()
    with world.engine.begin() as connection:
        connection.execute(text("ALTER TABLE job_events ADD CONSTRAINT ck_no_more CHECK (type = 'job.queued')"))
    try:
        for change in (world.try_claim, partial(world.cancel, job_id)):
            with pytest.raises(Exception, match="ck_no_more"):
                change()
            assert world.image() == before
    finally:
        with world.engine.begin() as connection:
            connection.execute(text("ALTER TABLE job_events DROP CONSTRAINT ck_no_more"))
