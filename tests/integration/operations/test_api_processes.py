"""Two API processes that share a port, as `winnow up` and the image start them."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.api_processes import ApiProcesses
from support.jobs import add_job, write_pool
from support.metrics_world import samples, value
from support.processes import Process, is_running, running
from support.servers import Servers, free_port
from support.waiting import until
from support.world import JOBS, SECRET, own_settings, register_model

from service.db.engine import make_engine, make_sessions
from service.keys.service import create_key
from service.ledger.state import JobStatus
from service.settings import ApiSettings
from service.storage.artifacts import ArtifactStore

STREAM = {"Accept": "text/event-stream"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def settings(servers: Servers, folder: Path) -> Iterator[ApiSettings]:
    with own_settings(servers, folder, ledger={"sweep_seconds": 0.2}) as settings:
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
        key: str = create_key(session, tenant_name="t", key_name="k", secret_key=SECRET)
    return key


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


def test_a_process_that_is_killed_is_replaced_and_what_it_held_is_not_counted(
    two: ApiProcesses, sessions: Any, settings: ApiSettings, folder: Path
) -> None:
    key = new_key(sessions)
    content = write_pool(ArtifactStore(settings.artifacts.url), folder / "pool", [("a", None, {"text": "x"})])
    job = add_job(sessions, key, content, JobStatus.RUNNING)
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
