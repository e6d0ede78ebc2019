"""Processes that stand still, as a machine does that swaps or is frozen, and go on when nobody expects them any more."""

import signal
import time
from pathlib import Path

import psutil
import psycopg
import pytest
from scenario import (
    COMPUTED,
    Told,
    attempts,
    errors,
    frozen,
    held_job,
    is_stopped,
    only_worker,
    struck,
    survived,
    worker_of,
)
from support.processes import Process
from undisturbed import Undisturbed
from world import LEDGER, World

LEASE_LOST = "lost the lease on"
# Passed by one unit of the job, which is alone in its wave: who passes it next is at the same unit.
_ALONE, _STAGE = "compute: before rename to influence/*.npy.json", "propagate"


def _told_since(log: Path, place: int) -> str:
    return log.read_bytes()[place:].decode(errors="replace")


def _until_told(world: World, worker: Process, place: int, what: str) -> None:
    world.until(f"{worker.log.name} says {what!r}", lambda: what in _told_since(worker.log, place))


def test_a_worker_that_stood_still_while_computing_is_fenced(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    """Its child goes on and finishes; when it wakes, another worker is at the same unit."""
    pair.faults.arm(_ALONE, action="hold")
    job_id = pair.submit()
    late = worker_of(pair, struck(pair))
    place = late.log.stat().st_size
    record_property("fault", "SIGSTOP of a worker that computes")
    pair.faults.arm(_ALONE, action="hold")
    with frozen(late):
        second = worker_of(pair, struck(pair))
        assert second is not late
        pair.faults.release(but_latest=True)
    _until_told(pair, late, place, LEASE_LOST)
    assert pair.get(job_id)["status"] == "running"
    pair.faults.release()
    survived(pair, undisturbed, job_id)
    assert errors(pair, job_id) == [(_STAGE, "lease_expired")]
    assert attempts(pair, job_id, _STAGE) == [
        ("unit.claimed", 1),
        ("unit.attempt_failed", 1),
        ("unit.claimed", 2),
        ("unit.succeeded", 2),
    ]


@pytest.mark.slow
def test_a_unit_that_takes_many_leases_is_not_taken_over(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    job_id = held_job(pair)
    record_property("fault", "a unit that takes two leases")
    begun = time.monotonic()
    pair.until("two leases are over", lambda: time.monotonic() - begun > 2 * LEDGER.lease_seconds)
    survived(pair, undisturbed, job_id)
    assert errors(pair, job_id) == []


@pytest.mark.slow
def test_a_worker_that_stood_still_while_it_wrote_is_fenced(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    """It holds the job's row: the server ends its transaction after a lease; until then other jobs go on."""
    long = {"WINNOW_LEDGER__LEASE_SECONDS": "30"}
    with only_worker(pair, **long) as one:
        other = pair.add_worker(**long)
        pair.until("both are ready", lambda: all("ready." in worker.log.read_text() for worker in (one, other)))
        pair.faults.arm("worker: before commit of …start_stages…", action="stop")
        job_id = pair.submit()
        late = worker_of(pair, struck(pair))
        try:
            pair.until("it stands still", lambda: is_stopped(late.pid))
            record_property("fault", "SIGSTOP of a worker in a write transaction")
            place = late.log.stat().st_size
            beside = pair.submit()
            pair.until("the other job goes on", lambda: pair.events(beside, "unit.succeeded"))
            assert _idle_in_transaction(pair), "the other job had to wait for the stopped worker"
            survived(pair, undisturbed, job_id, beside)
        finally:
            late.signal(signal.SIGCONT)
        _until_told(pair, late, place, LEASE_LOST)
        assert [code for _, code in errors(pair, job_id)] == ["lease_expired"]
        pair.audit()


def test_a_worker_that_is_killed_in_a_round_of_refining_changes_nothing(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    """In the last round, when there are gradients of the rounds before, on which the regression was fitted again."""
    with only_worker(pair) as worker:
        pair.faults.arm(COMPUTED, passing=undisturbed["points"][COMPUTED], action="hold")
        job_id = pair.submit()
        struck(pair)
        record_property("fault", "SIGKILL of a worker in the last round of refining")
        worker.kill()
        survived(pair, undisturbed, job_id)
        assert errors(pair, job_id) == [("refine", "lease_expired")]
        stages = [event["stage"] for event in pair.events(job_id, "unit.succeeded")]
        assert (stages.count("refine"), stages.count("propagate")) == (2, 3)


def _idle_in_transaction(world: World) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
    with psycopg.connect(world.database_url) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.slow
def test_a_compute_child_that_stands_still_is_replaced(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    # Long enough for a compute process to start on a busy machine: while it imports torch it sends nothing.
    with only_worker(pair, WINNOW_WORKER__STALL_SECONDS="40"):
        pair.faults.arm(COMPUTED, action="stop")
        job_id = pair.submit()
        child = struck(pair)
        pair.until("it stands still", lambda: not psutil.pid_exists(child) or is_stopped(child))
        record_property("fault", "SIGSTOP of a compute child")
        survived(pair, undisturbed, job_id)
        assert len(errors(pair, job_id)) == 1
        assert not psutil.pid_exists(child)
