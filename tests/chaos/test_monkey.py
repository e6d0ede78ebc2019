"""Faults of all kinds at random, one every two seconds for a minute, while jobs run. CHAOS_SEED repeats a run's choices."""

import os
import random
import secrets
import signal
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest
import redis
from scenario import Told, frozen, survived
from support.processes import Process
from support.servers import Servers
from support.tiny import pool_rows, target_rows
from undisturbed import Undisturbed
from world import LEDGER, POOL, TARGET, TERMINAL, World

_SECONDS, _EVERY = 60.0, 2.0
_JOBS = 3
_SEED = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(10**6))
_END_ALL = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND datname = current_database()
"""


class Monkey:
    """Does one of its faults at a time; what dies is started again by whoever waits for the jobs."""

    def __init__(self, disturbed: World, servers: Servers) -> None:
        self._world = disturbed
        self._servers = servers
        self._random = random.Random(_SEED)
        self.faults: list[Callable[[], None]] = [
            self.kill_a_worker,
            self.end_a_worker,
            self.freeze_a_worker,
            self.kill_a_child,
            self.kill_the_api,
            self.flush_the_broker,
            self.restart_the_broker,
            self.freeze_the_broker,
            self.end_all_connections,
            self.restart_the_database,
        ]

    def act(self) -> str:
        fault = self._random.choice(self.faults)
        fault()
        return fault.__name__

    def _worker(self) -> Process:
        return self._random.choice(self._world.workers)

    def kill_a_worker(self) -> None:
        self._worker().kill()

    def end_a_worker(self) -> None:
        self._worker().stop()

    def freeze_a_worker(self) -> None:
        worker = self._worker()
        if worker.is_alive:
            with frozen(worker):
                time.sleep(self._random.uniform(1, 6))

    def kill_a_child(self) -> None:
        for pid in self._worker().children():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def kill_the_api(self) -> None:
        self._world.api.kill()

    def flush_the_broker(self) -> None:
        with redis.Redis.from_url(self._servers.broker.url) as broker:
            broker.flushall()

    def restart_the_broker(self) -> None:
        with self._servers.broker.away():
            time.sleep(1)

    def freeze_the_broker(self) -> None:
        with self._servers.broker.frozen():
            time.sleep(2)

    def end_all_connections(self) -> None:
        with psycopg.connect(self._world.database_url) as connection:
            connection.execute(_END_ALL)

    def restart_the_database(self) -> None:
        with self._servers.postgres.away():
            time.sleep(0.5)


@pytest.fixture
def patient(servers: Servers) -> Iterator[World]:
    """Two workers, and as many attempts as chance may take from one unit."""
    with World.made(servers, LEDGER.model_copy(update={"max_attempts": 20})) as made:
        made.add_worker()
        made.add_worker()
        yield made


@pytest.mark.slow
def test_jobs_survive_a_minute_of_everything(
    patient: World, servers: Servers, undisturbed: Undisturbed, record_property: Told
) -> None:
    print(f"CHAOS_SEED={_SEED}")
    monkey = Monkey(patient, servers)
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        patient.clear()
        pool, target = patient.upload(pool_rows(POOL)), patient.upload(target_rows(TARGET, "python_function"))
        for _ in range(_JOBS):
            patient.post_usual(pool, target)
        while time.monotonic() < until and not _have_ended(patient):
            record_property("fault", monkey.act())
            time.sleep(_EVERY)
        job_ids = patient.job_ids()  # more, where a client had no answer to its POST
        assert len(job_ids) >= _JOBS
        survived(patient, undisturbed, *job_ids, to_the_bit=False)


def _have_ended(disturbed: World) -> bool:
    return all(disturbed.get(job_id)["status"] in TERMINAL for job_id in disturbed.job_ids())
