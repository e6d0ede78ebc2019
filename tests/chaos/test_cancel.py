"""A cancel races the last write of its job: one of them wins, and nothing of the other is there."""

import time
from collections import Counter

import psycopg
from scenario import Told, only_in_full, survived
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
    UPDATE job_units SET state = 'running', lease_expires_at = now() WHERE job_id = %(new)s AND stage <> 'publish';
    UPDATE job_units SET state = 'succeeded', lease_expires_at = null WHERE job_id = %(new)s AND stage <> 'publish';
    UPDATE job_units SET attempt = 0, finished_at = null, result = null, artifact_key = 'publish/' || %(new)s::text
        WHERE job_id = %(new)s AND stage = 'publish';
    INSERT INTO job_events (job_id, type, data) SELECT %(new)s, type, data FROM job_events
        WHERE job_id = %(of)s AND type <> 'job.succeeded' AND data->>'stage' IS DISTINCT FROM 'publish' ORDER BY id;
"""


def _almost_done(world: World, done: str) -> str:
    job_id = new_id("job")
    with psycopg.connect(world.database_url, cursor_factory=psycopg.ClientCursor) as connection:
        connection.execute(_ALMOST_DONE, {"new": job_id, "of": done})
    return job_id


def test_a_cancel_races_the_last_write(pair: World, undisturbed: Undisturbed, record_property: Told) -> None:
    """Real workers publish and the real API cancels; the cancel comes ever closer to the moment at which it is too late."""
    done = pair.submit()
    assert pair.ended(done)["status"] == "succeeded"
    delay, outcomes = 0.0, Counter[str]()
    for _ in range(_RACES):
        job_id = _almost_done(pair, done)
        time.sleep(delay)
        pair.call("POST", f"/v1/selection-jobs/{job_id}/cancel")
        status = pair.ended(job_id)["status"]
        record_property("fault", "cancel against finish")
        outcomes[status] += 1
        delay = max(0.0, delay + (_STEP if status == "cancelled" else -_STEP))
        if status == "succeeded":
            assert pair.selection(job_id) == undisturbed["selection"]
    assert set(outcomes) == {"succeeded", "cancelled"}, outcomes
    survived(pair, undisturbed, done)


@only_in_full
def test_a_cancel_at_any_time_of_a_job(pair: World, undisturbed: Undisturbed, record_property: Told) -> None:
    """The whole way of a job by the API, cancelled after ever more of its units."""
    job = pair.get(pair.submit())
    pool, target = job["pool"], job["target"]
    for units in range(_JOBS):
        job_id = pair.post(pool, target)
        pair.until("so many units are done", lambda at=units, of=job_id: len(pair.events(of, "unit.succeeded")) >= at)
        pair.call("POST", f"/v1/selection-jobs/{job_id}/cancel")
        record_property("fault", "cancel of a running job")
        if pair.ended(job_id)["status"] == "succeeded":
            assert pair.selection(job_id) == undisturbed["selection"]
    survived(pair, undisturbed, pair.post(pool, target))
