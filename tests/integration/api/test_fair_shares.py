"""One tenant takes all that it gets of what is shared, over real HTTP; another one is served at once."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import IO, Any

import httpx
import pytest
from support.jobs import add_job, move, write_pool
from support.shares import holding
from support.waiting import until
from support.world import DATASETS, JOBS, World, make_settings, register_model, serving

from service.datasets import router
from service.datasets.convert import convert
from service.db.locks import advisory_lock
from service.ledger.state import JobStatus
from service.shares import Share

SHARES = {"streams": 4, "waiters": 4, "downloads": 2, "uploads": 6, "readers": 2, "tenant_fraction": 0.5}
PATIENCE = 60.0
AT_ONCE = 15.0  # on a busy machine; whoever waits for the other tenant waits for ever
STREAM = {"Accept": "text/event-stream"}
SLOW = b'{"text": "slow"}\n'


@pytest.fixture(scope="module")
def world(postgres_url: str, broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("shares")
    settings = make_settings(postgres_url, folder, broker_url=broker_url, shares=SHARES)
    register_model(settings)
    with World.made(settings, runs=True) as world:
        yield world


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    with serving(world.app) as url:
        yield url


def client(url: str, key: str, seconds: float) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=seconds)


@pytest.fixture
def greedy(world: World, url: str) -> Iterator[httpx.Client]:
    with client(url, world.key, PATIENCE) as greedy:
        yield greedy


@pytest.fixture
def other(world: World, url: str) -> Iterator[httpx.Client]:
    with client(url, world.other_key, AT_ONCE) as other:
        yield other


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


@pytest.fixture(scope="module")
def content(world: World) -> Any:
    return write_pool(world.store, world.folder / "pool", [("a", None, {"text": "x"})])


def running_job(world: World, key: str, content: Any) -> str:
    return add_job(world.sessions, key, content, JobStatus.RUNNING)


def share(world: World, name: str) -> Share:
    return next(share for share in world.app.state.shares if share.name == name)


def refused(answer: httpx.Response, name: str) -> None:
    """Because the tenant's own part is used up."""
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["param"]) == (429, "share_used_up", name)
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["x-should-retry"] == "true"


def goes_through_at_once(world: World, other: httpx.Client, content: Any) -> None:
    """An upload, a job on it, a poll, a wait and a stream."""
    dataset = other.post(DATASETS, params={"name": "d"}, content=b'{"text": "a"}\n{"text": "b"}\n')
    assert dataset.status_code == 201, dataset.text
    id = dataset.json()["id"]
    job = other.post(JOBS, json={"model": "small", "pool": id, "target": id, "budget": 1})
    assert job.status_code == 202, job.text
    assert other.get(f"{JOBS}/{job.json()['id']}").status_code == 200
    waited = other.get(f"{JOBS}/{running_job(world, world.other_key, content)}", params={"wait": 1})
    assert (waited.status_code, waited.json()["status"]) == (200, "running")
    with other.stream("GET", f"{JOBS}/{running_job(world, world.other_key, content)}/events", headers=STREAM) as stream:
        assert stream.status_code == 200
        assert next(stream.iter_text()) == "retry: 2000\n\n"


def test_streams_and_waits(
    world: World, greedy: httpx.Client, other: httpx.Client, content: Any, threads: ThreadPoolExecutor
) -> None:
    job = running_job(world, world.key, content)
    polls: list[Future[httpx.Response]] = []
    with ExitStack() as open_streams:
        for _ in range(2):
            stream = greedy.stream("GET", f"{JOBS}/{job}/events", headers=STREAM)
            assert open_streams.enter_context(stream).status_code == 200
        refused(greedy.get(f"{JOBS}/{job}/events", headers=STREAM), "streams")
        polls.extend(threads.submit(greedy.get, f"{JOBS}/{job}", params={"wait": 60}) for _ in range(2))
        until("they wait", lambda: share(world, "waiters").held == 2)
        refused(greedy.get(f"{JOBS}/{job}", params={"wait": 60}), "waiters")
        assert greedy.get(f"{JOBS}/{job}").status_code == 200, "what needs no share is answered"
        goes_through_at_once(world, other, content)
    move(world.sessions, job, JobStatus.FAILED)
    assert {poll.result().json()["status"] for poll in polls} == {"failed"}
    until("nothing is held", lambda: share(world, "streams").held == share(world, "waiters").held == 0)
    assert greedy.get(f"{JOBS}/{job}/events").status_code == 200


def test_where_all_is_used_the_service_is_busy_for_everybody(world: World, other: httpx.Client, content: Any) -> None:
    job, streams = running_job(world, world.other_key, content), share(world, "streams")
    with ExitStack() as held:
        for tenant in ("first", "second"):
            for _ in range(streams.each):
                held.enter_context(holding(streams, tenant))
        answer = other.get(f"{JOBS}/{job}/events", headers=STREAM)
    assert (answer.status_code, answer.json()["code"]) == (503, "too_many_streams")
    assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("5", "true")


@contextmanager
def slow_conversions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files that begin with a certain row are converted once the context is left."""
    go_on = Event()

    def converting(file: IO[bytes], options: Any, limits: Any, folder: Path, **more: Any) -> Any:
        file.seek(0)
        if file.read(len(SLOW)) == SLOW:
            assert go_on.wait(PATIENCE)
        return convert(file, options, limits, folder, **more)

    monkeypatch.setattr(router, "convert", converting)
    try:
        yield
    finally:
        go_on.set()


def test_uploads_and_their_readers(
    world: World,
    greedy: httpx.Client,
    other: httpx.Client,
    content: Any,
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def upload() -> httpx.Response:
        return greedy.post(DATASETS, params={"name": "slow"}, content=SLOW)

    with slow_conversions(monkeypatch):
        uploads = [threads.submit(upload) for _ in range(3)]
        until("they are received", lambda: share(world, "uploads").held == 3)
        until("one is converted", lambda: share(world, "readers").held == 1)
        refused(upload(), "uploads")
        goes_through_at_once(world, other, content)
        assert not any(upload.done() for upload in uploads)
    assert [upload.result().status_code for upload in uploads] == [201] * 3
    assert (share(world, "uploads").held, share(world, "readers").held) == (0, 0)


def test_database_connections(
    world: World, greedy: httpx.Client, other: httpx.Client, content: Any, threads: ThreadPoolExecutor
) -> None:
    """Requests that wait for a lock of their own key keep their connections."""
    key_id = greedy.get("/v1/usage").json()["key_id"]
    other.get("/v1/usage")
    rows = b"".join(b'{"text": "%d"}\n' % i for i in range(3))
    with world.sessions.begin() as session:
        advisory_lock(session, f"quotas/bytes/{key_id}")
        uploads = [threads.submit(greedy.post, DATASETS, params={"name": "x"}, content=rows) for _ in range(6)]
        connections = share(world, "connections")
        until("they hold what they may", lambda: connections.held == connections.each)
        goes_through_at_once(world, other, content)
        assert not any(upload.done() for upload in uploads)
    answers = [upload.result() for upload in uploads]
    assert {answer.status_code for answer in answers} <= {201, 429}
    until("nothing is held", lambda: connections.held == 0)
