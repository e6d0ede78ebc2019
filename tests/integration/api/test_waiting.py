"""Waiting for a job over real HTTP: long polls and streams of events, told by PostgreSQL, with nothing held meanwhile."""

import asyncio
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Thread, active_count
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from support.jobs import add_job, move, write_pool
from support.processes import Process
from support.servers import free_port
from support.world import World as Service
from support.world import make_settings, serving

from service import ledger
from service.db.engine import Sessions
from service.jobs import notifications, streaming
from service.jobs.notifications import JobNotifications
from service.ledger.state import JobStatus
from winnow.client import Winnow

PATIENCE = 60.0
NEVER = 3600.0


@dataclass(frozen=True)
class World:
    """An API that listens on a port, and a job that runs."""

    app: FastAPI
    url: str
    key: str
    other_key: str
    content: Any

    @property
    def sessions(self) -> Sessions:
        return self.app.state.sessions

    @property
    def notifications(self) -> JobNotifications:
        return self.app.state.notifications

    def job(self, status: JobStatus = JobStatus.RUNNING) -> str:
        return add_job(self.sessions, self.key, self.content, status)

    def headers(self, **more: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} | {name.replace("_", "-"): value for name, value in more.items()}

    def get(self, path: str, *, timeout: float = 2 * PATIENCE, **more: str) -> httpx.Response:
        return httpx.get(f"{self.url}/v1/selection-jobs/{path}", headers=self.headers(**more), timeout=timeout)

    def tell(self, job_id: str, kind: str, **data: Any) -> None:
        with self.sessions.begin() as session:
            ledger.add_event(session, job_id, kind, **data)

    def succeed(self, job_id: str) -> None:
        move(self.sessions, job_id, JobStatus.SUCCEEDED)
        self.tell(job_id, "job.succeeded")

    def waits_for(self, job_id: str, count: int = 1) -> Callable[[], bool]:
        return lambda: len(self.notifications._waiters.get(job_id, ())) == count


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def watch_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """A list that each call of the method from here on adds to."""
    calls, method = [], getattr(owner, name)

    def watched(*given: Any) -> Any:
        calls.append(name)
        return method(*given)

    monkeypatch.setattr(owner, name, watched)
    return calls


@pytest.fixture(scope="module")
def world(postgres_url: str, broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("waiting")
    settings = make_settings(postgres_url, folder, broker_url=broker_url)
    with Service.made(settings) as made, serving(made.app, runs=True) as url:
        content = write_pool(made.store, folder / "pool", [("a", None, {"text": "x"})])
        until(lambda: made.app.state.notifications.is_listening)
        yield World(made.app, url, made.key, made.other_key, content)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks by himself: only a notification wakes."""
    monkeypatch.setattr(notifications, "_LOOK_SECONDS", NEVER)


class TestPoll:
    @pytest.mark.usefixtures("told")
    def test_is_answered_when_the_job_ends(self, world: World, pool: ThreadPoolExecutor) -> None:
        job_id = world.job()
        polled = pool.submit(world.get, f"{job_id}?wait=60")
        until(world.waits_for(job_id))
        world.tell(job_id, "unit.claimed")  # wakes, and it goes on waiting
        assert not polled.done()
        started = time.monotonic()
        world.succeed(job_id)
        answer = polled.result()
        assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
        assert "etag" in answer.headers
        assert time.monotonic() - started < 50  # a minute is what it would have waited for
        until(world.waits_for(job_id, 0))

    def test_a_lost_notification_costs_seconds(
        self, world: World, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(notifications, "_LOOK_SECONDS", 0.1)
        job_id = world.job()
        polled: Future[httpx.Response] = pool.submit(world.get, f"{job_id}?wait=60")
        until(world.waits_for(job_id))
        move(world.sessions, job_id, JobStatus.FAILED)  # writes no event
        assert polled.result().json()["status"] == "failed"

    def test_all_who_wait_are_looked_after_by_one_statement(
        self, world: World, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        jobs = [world.job() for _ in range(4)]
        polls = [pool.submit(world.get, f"{job_id}?wait=60") for job_id in jobs]
        until(lambda: all(world.waits_for(job_id)() for job_id in jobs))
        monkeypatch.setattr(notifications, "_LOOK_SECONDS", 0.1)
        looks = watch_calls(monkeypatch, world.notifications, "_changed")
        world.tell(jobs[0], "unit.claimed")  # the next look is soon after this one
        until(lambda: len(looks) > 3)
        reads = watch_calls(monkeypatch, world.app.state.reader, "rows")
        already = len(looks)
        until(lambda: len(looks) > already + 5)
        assert not reads
        for job_id in jobs:
            world.succeed(job_id)
        assert {poll.result().json()["status"] for poll in polls} == {"succeeded"}

    def test_what_ended_is_answered_at_once_and_what_does_not_as_it_is(self, world: World) -> None:
        assert world.get(f"{world.job(JobStatus.CANCELLED)}?wait=60").json()["status"] == "cancelled"
        answer = world.get(f"{world.job()}?wait=1")
        assert (answer.status_code, answer.json()["status"]) == (200, "running")
        assert answer.headers["retry-after"] == "0"
        assert "etag" not in answer.headers

    @pytest.mark.parametrize("wait", ["61", "-1", "x", "nan", "1.5"])
    def test_another_time_is_refused(self, world: World, wait: str) -> None:
        answer = world.get(f"job_0?wait={wait}")
        assert (answer.status_code, answer.json()["param"]) == (422, "wait")

    def test_another_tenants_job_is_not_waited_for(self, world: World) -> None:
        answer = world.get(f"{world.job()}?wait=60", Authorization=f"Bearer {world.other_key}")
        assert answer.status_code == 404

    def test_it_ends_when_the_client_has_left(self, world: World) -> None:
        job_id = world.job()
        request = (
            f"GET /v1/selection-jobs/{job_id}?wait=60 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {world.key}\r\n\r\n"
        )
        port = httpx.URL(world.url).port
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(request.encode())
            until(world.waits_for(job_id))
        until(world.waits_for(job_id, 0))

    @pytest.mark.usefixtures("told")
    def test_many_hold_neither_connections_nor_threads(self, world: World) -> None:
        job_id, count = world.job(), 200

        async def poll_all() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=count)
            async with httpx.AsyncClient(headers=world.headers(), timeout=2 * PATIENCE, limits=limits) as client:
                url = f"{world.url}/v1/selection-jobs/{job_id}?wait=60"
                polls = [asyncio.create_task(client.get(url)) for _ in range(count)]
                while not world.waits_for(job_id, count)() or world.app.state.engine.pool.checkedout():
                    await asyncio.sleep(0.01)
                assert active_count() < 100
                await asyncio.to_thread(world.succeed, job_id)
                return await asyncio.gather(*polls)

        answers = asyncio.run(poll_all())
        assert {(answer.status_code, answer.json()["status"]) for answer in answers} == {(200, "succeeded")}

    def test_the_time_waited_is_not_the_services_time(self, world: World) -> None:
        def seconds() -> float:
            labels = {"method": "GET", "route": "/v1/selection-jobs/{job_id}"}
            return world.app.state.metrics.registry.get_sample_value("winnow_http_request_seconds_sum", labels) or 0.0

        before = seconds()
        world.get(f"{world.job()}?wait=2")
        assert seconds() - before < 2


def test_the_listener_comes_back_and_wakes_who_may_have_missed_something(
    world: World, pool: ThreadPoolExecutor
) -> None:
    job_id = world.job()
    polled = pool.submit(world.get, f"{job_id}?wait=60")
    until(world.waits_for(job_id))
    with world.app.state.engine.connect() as connection:
        found = connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'winnow notifications'"
        )
        assert found.rowcount == 1
    world.succeed(job_id)
    assert polled.result().json()["status"] == "succeeded"
    until(lambda: world.notifications.is_listening)


class Stream:
    """Reads a stream of events in a thread, as it comes."""

    def __init__(self, world: World, job_id: str, **headers: str) -> None:
        self.text = ""
        self.response: httpx.Response | None = None
        self._request = ("GET", f"{world.url}/v1/selection-jobs/{job_id}/events")
        self._headers = world.headers(Accept="text/event-stream", **headers)
        self.thread = Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        with httpx.stream(*self._request, headers=self._headers, timeout=2 * PATIENCE) as self.response:
            for part in self.response.iter_text():
                self.text += part

    def events(self) -> list[dict[str, str]]:
        blocks = (block for block in self.text.split("\n\n") if "data: " in block)
        return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]

    def join(self) -> list[dict[str, str]]:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return self.events()


class TestEvents:
    @pytest.mark.usefixtures("told")
    def test_come_as_they_happen_until_the_job_ends(self, world: World) -> None:
        job_id = world.job()
        for number in range(120):  # more than are read at once
            world.tell(job_id, "unit.claimed", number=number, text="line\nfeed \u2028")
        stream = Stream(world, job_id)
        until(lambda: len(stream.events()) == 120)
        world.tell(job_id, "unit.succeeded")
        until(lambda: len(stream.events()) == 121)
        world.succeed(job_id)
        found = stream.join()
        assert stream.response is not None
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert stream.response.headers["cache-control"] == "no-store"
        assert "content-encoding" not in stream.response.headers
        assert stream.response.headers["x-request-id"]
        assert stream.text.startswith("retry: 2000\n\n")
        page = world.get(f"{job_id}/events?limit=1000").json()["data"]
        assert [json.loads(event["data"]) for event in found] == page
        assert [(event["id"], event["event"]) for event in found] == [(str(e["id"]), e["type"]) for e in page]

        middle = page[100]["id"]
        assert [event["id"] for event in Stream(world, job_id, Last_Event_ID=str(middle)).join()] == [
            str(event["id"]) for event in page[101:]
        ]
        end = world.get(f"{job_id}/events", Accept="text/event-stream", Last_Event_ID=str(page[-1]["id"]))
        assert (end.status_code, end.content) == (204, b"")

    def test_a_lost_notification_costs_seconds(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(notifications, "_LOOK_SECONDS", 0.1)
        job_id = world.job()
        world.tell(job_id, "unit.claimed")
        stream = Stream(world, job_id)
        until(lambda: len(stream.events()) == 1)
        with world.sessions.begin() as session:
            session.execute(text("SET LOCAL session_replication_role = replica"))  # without the trigger that notifies
            ledger.add_event(session, job_id, "unit.succeeded")
        until(lambda: len(stream.events()) == 2)
        world.succeed(job_id)
        stream.join()

    def test_a_silent_stream_is_kept_alive(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streaming, "_KEEPALIVE_SECONDS", 0.05)
        job_id = world.job()
        stream = Stream(world, job_id)
        until(lambda: stream.text.count(": ping\n\n") >= 2)
        world.succeed(job_id)
        assert [event["event"] for event in stream.join()] == ["job.succeeded"]

    @pytest.mark.parametrize("sent", ["x", "-1", str(2**63)])
    def test_an_id_that_none_has_is_refused(self, world: World, sent: str) -> None:
        answer = world.get(f"{world.job()}/events", Accept="text/event-stream", Last_Event_ID=sent)
        assert (answer.status_code, answer.json()["param"].lower()) == (422, "last-event-id")

    def test_a_limit_and_another_tenants_job_are_refused(self, world: World) -> None:
        job_id = world.job()
        assert world.get(f"{job_id}/events?limit=5", Accept="text/event-stream").json()["param"] == "limit"
        key = f"Bearer {world.other_key}"
        assert world.get(f"{job_id}/events", Accept="text/event-stream", Authorization=key).status_code == 404

    def test_the_client_follows(self, world: World, pool: ThreadPoolExecutor) -> None:
        job_id = world.job()
        with Winnow(world.url, world.key) as winnow:
            followed = pool.submit(lambda: [event["type"] for event in winnow.follow(job_id)])
            until(world.waits_for(job_id))
            world.tell(job_id, "unit.claimed")
            world.succeed(job_id)
            assert followed.result(PATIENCE) == ["unit.claimed", "job.succeeded"]
            assert winnow.wait(job_id)["status"] == "succeeded"


def test_a_process_that_is_told_to_stop_lets_go_who_waits(world: World, postgres_url: str, tmp_path: Path) -> None:
    """uvicorn ends only after the requests that run, which would be never."""
    port = free_port()
    process = Process.api(world.app.state.settings, port, tmp_path / "log")
    there = World(world.app, f"http://127.0.0.1:{port}", world.key, world.other_key, world.content)

    def is_up() -> bool:
        assert process.is_alive
        try:
            return httpx.get(f"{there.url}/healthz").is_success
        except httpx.TransportError:
            return False

    try:
        until(is_up)
        job_id = world.job()
        world.tell(job_id, "unit.claimed")
        stream = Stream(there, job_id)
        until(lambda: len(stream.events()) == 1)
        assert process.stop() == -signal.SIGTERM
        assert [event["event"] for event in stream.join()] == ["unit.claimed"]
    finally:
        process.kill()
