"""PostgreSQL is restarted, is away, or ends every connection."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest
from scenario import COMPUTED, Told, held_job, struck, survived
from small_disk import fill, free, small_disk
from support.servers import Servers
from support.tiny import pool_rows
from undisturbed import Undisturbed
from world import JOB, World

_ROUNDS = 20
_PUBLISHING = "worker: before commit of …succeed_job…"
_END_ALL = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_api_says_that_the_database_is_away_and_recovers(
    pair: World, servers: Servers, undisturbed: Undisturbed, record_property: Told
) -> None:
    job_id = held_job(pair)
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


@pytest.mark.slow
def test_a_full_disk_of_the_database_is_reported_and_ends_no_job(
    pair: World, servers: Servers, undisturbed: Undisturbed, record_property: Told
) -> None:
    """Jobs and their events are moved to a disk that is filled. What is read goes on; what is written waits for room."""
    job_id = held_job(pair)
    job = pair.get(job_id)
    body = {**JOB, "pool": job["pool"], "target": job["target"]}
    with _tables_on_a_small_disk(pair, servers, "selection_jobs", "job_events") as disk:
        fill(disk)
        record_property("fault", "disk of PostgreSQL full")
        refused = [pair.client.post("/v1/selection-jobs", json=body) for _ in range(3)]
        assert {(answer.status_code, answer.json().get("code")) for answer in refused} == {(503, "database_full")}
        assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
        assert pair.get(job_id)["status"] == "running"
        pair.faults.release()
        free(disk)
        pair.ended(job_id)
    survived(pair, undisturbed, job_id)


@contextmanager
def _tables_on_a_small_disk(world: World, servers: Servers, *tables: str) -> Iterator[Path]:
    with psycopg.connect(servers.postgres.url, autocommit=True) as server:
        row = server.execute("SHOW data_directory").fetchone()
        assert row is not None
        data = Path(row[0])
        disk = data.parent / "small"
        with small_disk(disk, "16m"), psycopg.connect(world.database_url, autocommit=True) as connection:
            os.chown(disk, data.stat().st_uid, data.stat().st_gid)
            server.execute(f"CREATE TABLESPACE small LOCATION '{disk}'")
            try:
                for table in tables:
                    # A page with a row in it takes no other one: each insert needs a new page, for which there is no room.
                    connection.execute(f"ALTER TABLE {table} SET (fillfactor = 10)")
                    connection.execute(f"ALTER TABLE {table} SET TABLESPACE small")
                    connection.execute(f"VACUUM FULL {table}")  # nor is there an empty one that changes have left
                yield disk
            finally:
                free(disk)
                for table in tables:
                    connection.execute(f"ALTER TABLE {table} SET TABLESPACE pg_default")
                server.execute("CHECKPOINT")  # until then the files of the tables are there
                server.execute("DROP TABLESPACE small")


def _is_away(answer: httpx.Response) -> bool:
    told = answer.status_code, answer.json()["code"], int(answer.headers.get("Retry-After", 0)) > 0
    return told == (503, "database_away", True)
