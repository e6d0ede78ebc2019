"""Two API processes that share a port, as `winnow up` and the image start them."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import select, text
from support.api_processes import ApiProcesses
from support.jobs import add_job, write_pool
from support.metrics_world import samples, value
from support.processes import Process, is_running, running
from support.servers import Servers, free_port
from support.waiting import until
from support.world import JOBS, SECRET, own_settings, register_model

from service.auth.tables import ApiKey
from service.db import budget
from service.db.engine import make_engine, make_sessions
from service.ids import new_id
from service.keys.service import create_key
from service.ledger.state import JobStatus
from service.settings import ApiSettings
from service.shares import READS
from service.storage.artifacts import ArtifactStore

STREAM = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def settings(servers: Servers, folder: Path) -> Iterator[ApiSettings]:
    few = {"streams": 4, "tenant_fraction": 0.5}
    with own_settings(servers, folder, ledger={"sweep_seconds": 0.2}, shares=few) as settings:
        register_model(settings)
        yield settings


@pytest.fixture(scope="module")
def two(settings: ApiSettings, folder: Path) -> Iterator[ApiProcesses]:
    with ApiProcesses.made(settings, folder) as two:
        yield two


@pytest.fixture(scope="module")
def sessions(settings: ApiSettings) -> Iterator[Any]:
    engine = make_engine(settings.database)
    yield make_sessions(engine)
    engine.dispose()


def new_key(sessions: Any) -> str:
    with sessions.begin() as session:
        key: str = create_key(session, tenant_name=new_id("tenant"), key_name="k", secret_key=SECRET)
    return key


def running_job(sessions: Any, settings: ApiSettings, folder: Path, key: str) -> str:
    content = write_pool(ArtifactStore(settings.artifacts.url), folder / new_id("pool"), [("a", None, {"text": "x"})])
    return add_job(sessions, key, content, JobStatus.RUNNING)


@pytest.fixture
def clients(two: ApiProcesses, sessions: Any) -> Iterator[list[httpx.Client]]:
    """One for each process, with the same key."""
    key = new_key(sessions)
    with ExitStack() as opened:
        yield [opened.enter_context(two.client(pid, key)) for pid in two.wait_ready()]


def metrics(client: httpx.Client) -> dict[Any, float]:
    return samples(client.get("/metrics").text)


def test_metrics_are_sums_whichever_process_is_asked(two: ApiProcesses, clients: list[httpx.Client]) -> None:
    def answered(client: httpx.Client) -> float:
        labels = {"method": "GET", "route": "/v1/models", "status": "200"}
        return value(metrics(client), "http_requests_total", **labels) or 0

    before = answered(clients[0])
    for client, count in zip(clients, (3, 4), strict=True):
        for _ in range(count):
            assert client.get("/v1/models").status_code == 200
    assert [answered(client) - before for client in clients] == [7, 7]
    found = metrics(clients[0])
    assert value(found, "http_request_seconds_count", method="GET", route="/v1/models") == before + 7
    assert value(found, "http_requests_in_flight") == 1
    assert value(found, "dispatch_leading") == 1, "one leads"
    assert value(found, "database_up") == 1
    memory = sum(psutil.Process(pid).memory_info().rss for pid in two.pids)
    assert found["process_resident_memory_bytes", frozenset()] == pytest.approx(memory, rel=0.2)


def limit(sessions: Any, key: str, per_minute: int) -> None:
    with sessions.begin() as session:
        row = session.scalars(select(ApiKey).where(ApiKey.prefix == key[4:16])).one()
        row.limits = {"requests_per_minute": per_minute}


@pytest.mark.parametrize("path", [f"{JOBS}/job_{'0' * 32}", JOBS], ids=["by the route", "at once"])
def test_a_rate_holds_over_both(two: ApiProcesses, sessions: Any, path: str) -> None:
    key = new_key(sessions)
    limit(sessions, key, 6)
    with ExitStack() as opened:
        clients = [opened.enter_context(two.client(pid, key)) for pid in two.wait_ready()]
        found = [clients[turn % 2].get(path) for turn in range(10)]
        assert [answer.status_code == 429 for answer in found] == [False] * 6 + [True] * 4
        assert {answer.json()["code"] for answer in found[6:]} == {"rate_limited"}


def test_open_streams_are_counted_over_both(
    two: ApiProcesses, sessions: Any, settings: ApiSettings, folder: Path
) -> None:
    key = new_key(sessions)
    job = running_job(sessions, settings, folder, key)
    with ExitStack() as opened:
        clients = [opened.enter_context(two.client(pid, key)) for pid in two.wait_ready() for _ in range(3)]
        for client in (clients[0], clients[3]):  # one at each process: of four a tenant may have two
            stream = opened.enter_context(client.stream("GET", f"{JOBS}/{job}/events", headers=STREAM))
            assert stream.status_code == 200
        for client in (clients[1], clients[4]):
            answer = client.get(f"{JOBS}/{job}/events", headers=STREAM)
            assert (answer.status_code, answer.json()["code"]) == (429, "share_used_up")
        clients[0].close()

        def has_room() -> bool:
            with clients[4].stream("GET", f"{JOBS}/{job}/events", headers=STREAM) as stream:
                return stream.status_code == 200

        until("what one process gives back the other may have", has_room)


def test_without_the_broker_each_counts_for_itself_and_says_so(
    two: ApiProcesses, sessions: Any, settings: ApiSettings, folder: Path, servers: Servers
) -> None:
    key = new_key(sessions)
    limit(sessions, key, 6)
    with ExitStack() as opened:
        clients = [opened.enter_context(two.client(pid, key)) for pid in two.wait_ready()]
        with servers.broker.away():
            until("both have noticed", lambda: value(metrics(clients[0]), "counting_alone") == 2)
            for client in clients:
                assert [client.get(JOBS).status_code for _ in range(8)] == [200] * 6 + [429] * 2
            other = new_key(sessions)
            job = running_job(sessions, settings, folder, other)
            with (
                two.client(two.pids[0], other) as client,
                client.stream("GET", f"{JOBS}/{job}/events", headers=STREAM) as stream,
            ):
                assert stream.status_code == 200
        until("it counts with the other again", lambda: value(metrics(clients[0]), "counting_alone") == 0)
        fresh = new_key(sessions)
        limit(sessions, fresh, 2)
        headers = {"Authorization": f"Bearer {fresh}"}
        found = [clients[turn % 2].get(JOBS, headers=headers).status_code for turn in range(4)]
        assert found == [200, 200, 429, 429]


def test_each_takes_no_more_connections_than_it_may(two: ApiProcesses, sessions: Any, settings: ApiSettings) -> None:
    key = new_key(sessions)
    limit(sessions, key, 0)
    with ExitStack() as opened, ThreadPoolExecutor(32) as threads:
        clients = [opened.enter_context(two.client(pid, key)) for pid in two.wait_ready()]
        list(
            threads.map(lambda path: httpx.get(f"{two.url}{path}", headers=clients[0].headers), ["/v1/datasets"] * 200)
        )
        with sessions() as session:
            found = budget.room(session.connection())
            own = session.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"))
    assert found.api_processes == 2
    assert 2 * READS <= own <= 2 * budget.of_api_process(settings.database) + 1


def test_a_process_that_is_killed_is_replaced_and_what_it_held_is_not_counted(
    two: ApiProcesses, sessions: Any, settings: ApiSettings, folder: Path
) -> None:
    key = new_key(sessions)
    job = running_job(sessions, settings, folder, key)
    doomed, other = two.wait_ready()
    with two.client(other, key) as client:
        with (
            two.client(doomed, key) as lost,
            lost.stream("GET", f"{JOBS}/{job}/events", headers=STREAM) as stream,
        ):
            assert stream.status_code == 200
            until("it is counted", lambda: value(metrics(client), "shares_held", share="streams") == 1)
            requests = sum(v for (name, _), v in metrics(client).items() if name == "winnow_http_requests_total")
            os.kill(doomed, signal.SIGKILL)
        assert client.get(f"{JOBS}/{job}").status_code == 200, "the other one serves on"
        pids = two.wait_ready()
        assert doomed not in pids
        assert other in pids
        found = metrics(client)
        assert value(found, "shares_held", share="streams") == 0
        assert sum(v for (name, _), v in found.items() if name == "winnow_http_requests_total") >= requests
        until("one leads", lambda: value(metrics(client), "dispatch_leading") == 1)


def test_they_end_together_however_the_first_one_ends(settings: ApiSettings, tmp_path: Path) -> None:
    with ApiProcesses.made(settings, tmp_path) as two:
        pids = two.pids
        two.first.kill()
        until("they have ended", lambda: not any(map(is_running, pids)))
        two.first.start()  # on the same port
        pids = two.wait_ready()
        assert two.first.stop() == 0
        assert not any(map(is_running, pids))


def test_where_one_cannot_start_all_end(settings: ApiSettings, tmp_path: Path) -> None:
    nowhere = {"WINNOW_ARTIFACTS__URL": "nowhere://"}
    with running(Process.apis(settings, free_port(), tmp_path / "api.log", 2, **nowhere)) as first:
        assert first.wait() != 0


def test_settings_that_are_wrong_are_named_at_once(settings: ApiSettings, tmp_path: Path) -> None:
    with running(Process.apis(settings, free_port(), tmp_path / "api.log", 2, WINNOW_SECRET_KEY="short")) as first:
        assert first.wait() == 1
    assert "WINNOW_SECRET_KEY" in first.log.read_text()
