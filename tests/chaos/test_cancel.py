"""A cancel races the last write of its job: one of them wins, and nothing of the other is there."""

import signal
import time
from collections import Counter

import psycopg
import pytest
from scenario import Told, is_stopped, struck, survived, worker_of
from support.world import JOBS
from undisturbed import Undisturbed
from world import World

from service.ids import new_id

_RACES = 50
_JOBS = 6
_STEP = 0.01

# A job of which all units but the last are done, made of one that has ended; the triggers demand every step.
_ALMOST_DONE = """
    INSERT INTO selection_jobs SELECT (jsonb_populate_record(job, jsonb_build_object(
        'id', %(new)s::text, 'status', 'queued', 'created_at', clock_timestamp(), 'finished_at', null))).*
        FROM selection_jobs job WHERE id = %(of)s;
    UPDATE selection_jobs SET status = 'running' WHERE id = %(new)s;
    INSERT INTO job_units OVERRIDING SYSTEM VALUE SELECT (jsonb_populate_record(unit, jsonb_build_object(
        'id', nextval(pg_get_serial_sequence('job_units', 'id')), 'job_id', %(new)s::text, 'state', 'pending'))).*
        FROM job_units unit WHERE job_id = %(of)s;
    UPDATE job_units SET state = 'running', lease_expires_at = now() WHERE job_id = %(new)s AND stage <> 'validate';
    UPDATE job_units SET state = 'succeeded', lease_expires_at = null WHERE job_id = %(new)s AND stage <> 'validate';
    UPDATE job_units SET attempt = 0, finished_at = null, result = null WHERE job_id = %(new)s AND stage = 'validate';
    INSERT INTO job_events (job_id, type, data) SELECT %(new)s, type, data FROM job_events
        WHERE job_id = %(of)s AND type <> 'job.succeeded' AND data->>'stage' IS DISTINCT FROM 'validate' ORDER BY id;
"""


def _almost_done(world: World, done: str) -> str:
    job_id = new_id("job")
    with psycopg.connect(world.database_url, cursor_factory=psycopg.ClientCursor) as connection:
        connection.execute(_ALMOST_DONE, {"new": job_id, "of": done})
    return job_id


@pytest.mark.slow
def test_a_cancel_races_the_last_write(pair: World, undisturbed: Undisturbed, record_property: Told) -> None:
    """Real workers publish and the real API cancels; the cancel comes ever closer to the moment at which it is too late, by steps
    that grow while the same side wins: how long a job takes depends on the machine."""
    done = pair.submit()
    assert pair.ended(done)["status"] == "succeeded"
    delay, step, last, outcomes = 0.0, _STEP, "", Counter[str]()
    for _ in range(_RACES):
        job_id = _almost_done(pair, done)
        time.sleep(delay)
        pair.call("POST", f"/v1/selection-jobs/{job_id}/cancel")
        status = pair.ended(job_id)["status"]
        record_property("fault", "cancel against finish")
        outcomes[status] += 1
        step, last = 1.5 * step if status == last else _STEP, status
        delay = max(0.0, delay + (step if status == "cancelled" else -step))
        if status == "succeeded":
            assert pair.selection(job_id) == undisturbed["selection"]
    assert set(outcomes) == {"succeeded", "cancelled"}, outcomes
    survived(pair, undisturbed, done)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "end"), [("before", "cancelled"), ("after", "succeeded")])
def test_a_cancel_meets_a_worker_that_stands_still_at_its_last_write(
    pair: World, undisturbed: Undisturbed, record_property: Told, moment: str, end: str
) -> None:
    """As long as it takes until the cancel is enforced without it; when it wakes, it changes nothing of the job."""
    pair.faults.arm(f"worker: {moment} commit of …succeed_job…", action="stop")
    job_id = pair.submit()
    late = worker_of(pair, struck(pair))
    pair.until("it stands still", lambda: is_stopped(late.pid))
    record_property("fault", f"cancel while a worker stands still {moment} its last write")
    try:
        pair.cancel(
            job_id
        )  # before: the server ends the worker's transaction, which holds the job's row, after a lease
        assert pair.ended(job_id)["status"] == end
    finally:
        late.signal(signal.SIGCONT)
    job = pair.get(job_id)
    survived(pair, undisturbed, pair.post_usual(job["pool"], job["target"]))
    assert pair.get(job_id)["status"] == end
    found = pair.client.get(f"{JOBS}/{job_id}/results").status_code
    assert found == (200 if end == "succeeded" else 409)
    if end == "succeeded":
        assert pair.selection(job_id) == undisturbed["selection"]


@pytest.mark.slow
def test_a_cancel_at_any_time_of_a_job(pair: World, undisturbed: Undisturbed, record_property: Told) -> None:
    """The whole way of a job by the API, cancelled after ever more of its units."""
    job = pair.get(pair.submit())
    pool, target = job["pool"], job["target"]
    for units in range(_JOBS):
        job_id = pair.post_usual(pool, target)
        pair.until("so many units are done", lambda at=units, of=job_id: len(pair.events(of, "unit.succeeded")) >= at)
        pair.call("POST", f"/v1/selection-jobs/{job_id}/cancel")
        record_property("fault", "cancel of a running job")
        if pair.ended(job_id)["status"] == "succeeded":
            assert pair.selection(job_id) == undisturbed["selection"]
    survived(pair, undisturbed, pair.post_usual(pool, target))
