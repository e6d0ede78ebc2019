"""PostgreSQL is restarted, is away, or ends every connection."""

import threading

import httpx
import psycopg
from scenario import COMPUTED, Told, only_in_full, struck, survived
from servers import Servers
from tiny import pool_rows
from undisturbed import Undisturbed
from world import JOB, World

_ROUNDS = 20
_PUBLISHING = "worker: before commit of publish+finish_unit+succeed_job"
_END_ALL = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"


def test_a_job_survives_that_all_connections_are_ended_again_and_again(
    pair: World, servers: Servers, undisturbed: Undisturbed, record_property: Told
) -> None:
    """Ever slower: twenty times in the first seconds, and on until the job has ended."""
    name = pair.database_url.rsplit("/", 1)[1].split("?")[0]
    ended, rounds = threading.Event(), 0

    def end_connections() -> None:
        nonlocal rounds
        with psycopg.connect(servers.postgres.url, autocommit=True) as connection:
            while not ended.wait(0.1 if rounds < _ROUNDS else 2.0) or rounds < _ROUNDS:
                connection.execute(_END_ALL, [name])
                rounds += 1

    job_id = pair.submit()
    ending = threading.Thread(target=end_connections)
    ending.start()
    try:
        pair.ended(job_id)
    finally:
        ended.set()
        ending.join()
    record_property("fault", f"all connections ended {rounds} times")
    assert rounds >= _ROUNDS
    survived(pair, undisturbed, job_id)


@only_in_full
def test_a_job_survives_restarts_of_the_database(
    pair: World, servers: Servers, undisturbed: Undisturbed, record_property: Told
) -> None:
    pair.faults.arm(COMPUTED, action="hold")
    job_id = pair.submit()
    for where, then in ((COMPUTED, _PUBLISHING), (_PUBLISHING, None)):
        struck(pair)
        record_property("fault", f"PostgreSQL restarted, {where}")
        with servers.postgres.away():
            if then is None:
                pair.faults.release()  # it commits to a server that is gone
        if then is not None:
            pair.faults.arm(then, action="hold")
            pair.faults.release(but_latest=True)
    survived(pair, undisturbed, job_id)


@only_in_full
def test_the_api_says_that_the_database_is_away_and_recovers(
    pair: World, servers: Servers, undisturbed: Undisturbed, record_property: Told
) -> None:
    pair.faults.arm(COMPUTED, action="hold")
    job_id = pair.submit()
    struck(pair)
    job = pair.get(job_id)
    record_property("fault", "PostgreSQL away")
    with servers.postgres.away():
        body = {**JOB, "pool": job["pool"], "target": job["target"]}
        answers = [
            pair.client.get(f"/v1/selection-jobs/{job_id}"),
            pair.client.post("/v1/selection-jobs", json=body),
            pair.client.post(f"/v1/selection-jobs/{job_id}/cancel"),
            pair.client.post("/v1/datasets", params={"name": "rows"}, content=f"{pool_rows(1)[0]}"),
        ]
        for answer in answers:
            assert _is_away(answer), (answer.status_code, answer.text)
    assert pair.get(job_id)["status"] == "running"
    survived(pair, undisturbed, job_id)


def _is_away(answer: httpx.Response) -> bool:
    told = answer.status_code, answer.json()["code"], int(answer.headers.get("Retry-After", 0)) > 0
    return told == (503, "database_away", True)
