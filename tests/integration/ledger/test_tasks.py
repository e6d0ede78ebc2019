"""The queue of tasks: whose turn it is, the fence of the attempt, retries, leases that run out, and what is kept."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import text, update
from sqlalchemy.exc import IntegrityError
from support.ledger_world import AT_ONCE, LEASE, LedgerWorld, new_owner, new_task

from service import tasks
from service.db.engine import libpq_url
from service.ledger import Lack, LeaseLost, Retries
from service.tasks import Task, TaskClaim, TaskState

KINDS = ("import_dataset", "preview")
BROKEN = {"code": "broken", "detail": "It is broken."}


def try_claim(world: LedgerWorld, worker_id: str = "w", **more: Any) -> TaskClaim | None:
    with world.sessions.begin() as session:
        return tasks.claim_task(session, **{"worker_id": worker_id, "lease_seconds": LEASE, "kinds": KINDS, **more})


def claim(world: LedgerWorld, **more: Any) -> TaskClaim:
    found = try_claim(world, **more)
    assert found is not None, "there is no task to claim"
    return found


def row(world: LedgerWorld, task_id: str) -> Task:
    with world.sessions() as session:
        return session.get_one(Task, task_id)


def write(world: LedgerWorld, change: Callable[..., Any], *args: Any, **more: Any) -> Any:
    with world.sessions.begin() as session:
        return change(session, *args, **more)


def past(world: LedgerWorld, task_id: str, column: str) -> None:
    """As time does."""
    with world.engine.begin() as connection:
        connection.execute(text(f"UPDATE tasks SET {column} = now() - interval '2 hours' WHERE id = '{task_id}'"))


LATE: dict[str, Callable[[LedgerWorld, TaskClaim], object]] = {
    "beat": lambda world, late: write(world, tasks.beat, late, lease_seconds=LEASE, progress={"rows": 9}),
    "finish": lambda world, late: write(world, tasks.finish_task, late, {"mine": True}),
    "fail": lambda world, late: write(world, tasks.fail_task, late, BROKEN, retryable=True, retries=AT_ONCE),
    "release": lambda world, late: write(world, tasks.release_task, late),
}


def test_a_task_goes_its_way(world: LedgerWorld) -> None:
    task_id = new_task(world, subject="what for", input={"a": 1})
    taken = claim(world)
    assert (taken.task_id, taken.attempt, taken.subject, taken.input) == (task_id, 1, "what for", {"a": 1})
    assert try_claim(world) is None
    write(world, tasks.beat, taken, lease_seconds=LEASE, progress={"rows": 5})
    assert row(world, task_id).progress == {"rows": 5}
    write(world, tasks.finish_task, taken, {"found": 7})
    with world.sessions() as session:
        ended = tasks.latest(session, world.owner["tenant_id"], "import_dataset", "what for")
        assert tasks.latest(session, new_owner(world.sessions)["tenant_id"], "import_dataset", "what for") is None
    assert ended is not None
    assert (ended.id, ended.state, ended.result, ended.error) == (task_id, TaskState.SUCCEEDED, {"found": 7}, None)
    assert ended.finished_at is not None


def test_the_urgent_come_first_then_the_tenant_that_waited_longest(world: LedgerWorld) -> None:
    second = new_owner(world.sessions)
    mine = [new_task(world) for _ in range(3)]
    theirs = [new_task(world, second) for _ in range(2)]
    urgent = new_task(world, urgent=True, kind="preview")
    order = [claim(world).task_id for _ in range(6)]
    assert order == [urgent, theirs[0], mine[0], theirs[1], mine[1], mine[2]]


def test_a_worker_takes_neither_other_kinds_nor_what_it_lacks_the_model_of(world: LedgerWorld) -> None:
    model = {"kind": "registered", "name": "absent"}
    plain, preview = new_task(world), new_task(world, kind="preview", input={"model": model})
    other = new_task(world, kind="preview", input={"model": {**model, "name": "there"}})
    lacking = [Lack(problem="not here", model=model), Lack(problem="nor that", job_id="job_0")]
    assert claim(world, kinds=["preview"], without=lacking).task_id == other
    assert try_claim(world, kinds=["preview"], without=lacking) is None
    assert claim(world, without=lacking).task_id == plain
    assert claim(world).task_id == preview


def test_what_another_claims_just_now_is_skipped(world: LedgerWorld) -> None:
    first, second = new_task(world), new_task(world)
    with world.sessions.begin() as open_session:
        held = tasks.claim_task(open_session, worker_id="a", lease_seconds=LEASE, kinds=KINDS)
        assert held is not None
        assert held.task_id == first
        assert claim(world, worker_id="b").task_id == second
        assert try_claim(world, worker_id="c") is None


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("lost", ["expired", "deleted"])
def test_a_late_worker_writes_nothing(world: LedgerWorld, late: str, lost: str) -> None:
    task_id = new_task(world)
    first = claim(world)
    if lost == "deleted":
        write(world, tasks.delete, task_id)
    else:
        past(world, task_id, "lease_expires_at")
        assert write(world, tasks.expire_leases, retries=AT_ONCE) == 1
        assert claim(world, worker_id="other").attempt == 2
    with pytest.raises(LeaseLost):
        LATE[late](world, first)
    if lost == "expired":
        after = row(world, task_id)
        assert (after.state, after.worker_id, after.progress, after.failures) == (TaskState.RUNNING, "other", None, 1)


def test_it_is_retried_with_back_off_and_fails_after_the_last_attempt(world: LedgerWorld) -> None:
    task_id, retries = new_task(world), Retries(max_attempts=3, seconds=3600)
    for attempt in (1, 2, 3):
        taken = claim(world)
        assert taken.attempt == attempt
        over = write(world, tasks.fail_task, taken, BROKEN, retryable=True, retries=retries)
        assert over == (attempt == 3)
        if not over:
            assert try_claim(world) is None, "it does not wait"
            with world.sessions() as session:
                assert tasks.claimable_count(session, most=9) == 0
            past(world, task_id, "not_before")
    assert (row(world, task_id).state, row(world, task_id).error) == (TaskState.FAILED, BROKEN)


def test_what_cannot_succeed_fails_at_once_and_what_is_given_back_has_not_failed(world: LedgerWorld) -> None:
    task_id = new_task(world)
    for _ in range(5):
        write(world, tasks.release_task, claim(world))
    assert row(world, task_id).failures == 0
    assert write(world, tasks.fail_task, claim(world), BROKEN, retryable=False, retries=AT_ONCE)
    assert try_claim(world) is None


def test_leases_that_run_out_are_failed_attempts(world: LedgerWorld) -> None:
    other = new_task(world)
    claim(world)
    task_id = new_task(world)
    for _ in range(3):
        assert claim(world).task_id == task_id
        past(world, task_id, "lease_expires_at")
        assert write(world, tasks.expire_leases, retries=AT_ONCE) == 1
    ended = row(world, task_id)
    assert ended.state is TaskState.FAILED
    assert ended.error is not None
    assert ended.error["code"] == "lease_expired"
    assert row(world, other).state is TaskState.RUNNING, "a lease that holds was taken away"


def test_only_what_is_kept_no_longer_is_deleted(world: LedgerWorld) -> None:
    for_good, fresh = new_task(world), new_task(world, kept_seconds=7200 * 2)
    ended, waiting, running = (new_task(world, kept_seconds=60, subject=name) for name in ("e", "w", "r"))
    claims = {taken.task_id: taken for taken in (claim(world) for _ in range(5))}
    for task_id in (for_good, fresh, ended):
        write(world, tasks.finish_task, claims[task_id], {})
        past(world, task_id, "finished_at")
    write(world, tasks.release_task, claims[waiting])
    for task_id in (waiting, running):
        past(world, task_id, "created_at")
    assert write(world, tasks.delete_expired) == 2
    with world.engine.connect() as connection:
        left = set(connection.scalars(text("SELECT id FROM tasks")))
    assert left == {for_good, fresh, running}


def test_postgres_refuses_a_state_that_does_not_follow(world: LedgerWorld) -> None:
    task_id = new_task(world)
    write(world, tasks.finish_task, claim(world), {})
    for state in (TaskState.PENDING, TaskState.RUNNING):
        with pytest.raises(IntegrityError, match="cannot go from succeeded"), world.sessions.begin() as session:
            session.execute(update(Task).where(Task.id == task_id).values(state=state))


def test_its_end_is_notified_under_its_subject(world: LedgerWorld) -> None:
    with psycopg.connect(libpq_url(world.url), autocommit=True) as connection:
        connection.execute("LISTEN winnow_events")
        new_task(world, subject="ds_1")
        write(world, tasks.finish_task, claim(world), {})
        new_task(world, subject="ds_2")
        write(world, tasks.fail_task, claim(world), BROKEN, retryable=False, retries=AT_ONCE)
        told = [notification.payload for notification in connection.notifies(timeout=20, stop_after=2)]
    assert told == ["ds_1", "ds_2"]
