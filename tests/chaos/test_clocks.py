"""A host that slept, and hosts whose clocks are wrong or jump: leases and keys last by the clock of the database alone."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest
from scenario import Told, errors, held_job, survived
from support.servers import Servers
from undisturbed import Undisturbed
from world import LEDGER, World

_SLEEP_LEASES = 2.5  # as ten minutes have ten leases of a minute
_HOURS = 3_600


@contextmanager
def _asleep(world: World, servers: Servers) -> Iterator[None]:
    """Every process of the service stands still, those of PostgreSQL and the broker too; none comes to know of it."""
    own = [pid for process in world.processes for pid in (process.pid, *process.children())]
    everything = [*own, servers.broker.pid, *servers.postgres.pids]
    for pid in everything:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in everything:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_host_that_slept_goes_on_where_it_was(
    pair: World, servers: Servers, undisturbed: Undisturbed, record_property: Told
) -> None:
    """All leases are over when it wakes, and all connections are older than anybody waits for an answer."""
    job_id = held_job(pair)
    record_property("fault", "sleep of the host")
    with _asleep(pair, servers):
        time.sleep(_SLEEP_LEASES * LEDGER.lease_seconds)
    survived(pair, undisturbed, job_id)
    assert {code for _, code in errors(pair, job_id)} <= {"lease_expired"}
    assert len(errors(pair, job_id)) <= 1, "an attempt more than the one that was running was lost"


class _Clock:
    """The clock of a host, as libfaketime shows it to processes; what they measure durations with is left alone."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.step(0)

    def step(self, seconds: int) -> None:
        """From now on it is so many seconds wrong."""
        written = self._file.with_suffix(".new")
        written.write_text(f"{seconds:+d}")
        written.replace(self._file)

    @property
    def environment(self) -> dict[str, str]:
        package = find_spec("libfaketime")
        assert package is not None
        assert package.origin is not None
        return {
            "LD_PRELOAD": str(Path(package.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }


@pytest.mark.slow
def test_a_clock_that_jumps_ends_neither_a_lease_nor_a_key(
    servers: Servers, undisturbed: Undisturbed, record_property: Told, tmp_path: Path
) -> None:
    """That of the API and the worker, by hours, forwards and back, while a unit is at work."""
    clock = _Clock(tmp_path / "clock")
    with World.made(servers, **clock.environment) as world:
        with psycopg.connect(world.database_url) as connection:
            connection.execute("UPDATE api_keys SET expires_at = clock_timestamp() + interval '1 hour'")
        world.add_worker()
        job_id = held_job(world)
        for hours in (3, -2):
            clock.step(hours * _HOURS)
            world.until("the API's clock has jumped", lambda at=hours: _is_wrong(world, at))
            record_property("fault", "step of the clock")
            time.sleep(2 * LEDGER.lease_seconds)
            assert world.get(job_id)["status"] == "running"
        survived(world, undisturbed, job_id)
        assert errors(world, job_id) == []


def _is_wrong(world: World, hours: int) -> bool:
    """Whether the API's clock is so many hours wrong; a call that its key still opens says so."""
    shown = datetime.strptime(world.call("GET", "/v1/usage").headers["date"], "%a, %d %b %Y %H:%M:%S GMT").replace(
        tzinfo=UTC
    )
    return abs(shown - datetime.now(UTC) - timedelta(hours=hours)) < timedelta(minutes=5)
