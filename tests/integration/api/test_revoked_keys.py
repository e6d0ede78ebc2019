"""What goes on for long ends soon after its key was revoked or has expired: streams of events, waits, downloads, uploads."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from support.jobs import add_job, write_pool
from support.raw_http import connected
from support.results import Published, published_world
from support.waiting import until
from support.world import DATASETS, JOBS, make_settings, serving

from service.jobs import streaming
from service.ledger.state import JobStatus
from service.results import repository

ENDS = {"revoked": "revoked_at = now()", "expired": "expires_at = now()"}


@pytest.fixture(scope="module")
def world(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("revoked")
    with published_world(make_settings(postgres_url, folder), folder) as world:
        yield world


@pytest.fixture(scope="module")
def url(world: Published) -> Iterator[str]:
    with serving(world.app) as url:
        yield url


@pytest.fixture(scope="module")
def running(world: Published) -> str:
    content = write_pool(world.store, world.folder / "small", [("a", None, {"text": "x"})])
    return add_job(world.sessions, world.key, content, JobStatus.RUNNING)


@pytest.fixture
def key(world: Published) -> str:
    """Another key of the tenant."""
    return str(world.call("POST", "/v1/keys", json={"name": "another"}).json()["key"])


@pytest.fixture(params=ENDS)
def end(request: pytest.FixtureRequest, world: Published, key: str) -> Callable[[], None]:
    """Makes the key open nothing any more."""
    statement = text(f"UPDATE api_keys SET {ENDS[request.param]} WHERE prefix = :prefix")

    def end() -> None:
        with world.engine.begin() as connection:
            connection.execute(statement, {"prefix": key.split("_")[1]})

    return end


def key_id(world: Published, key: str) -> str:
    """Of the newest key."""
    found = world.call("GET", "/v1/keys").json()["data"][0]
    assert key.startswith(found["prefix"])
    return str(found["id"])


def bearer(key: str, **more: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", **more}


def test_a_stream_of_events_ends(
    world: Published, url: str, running: str, key: str, end: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_KEEPALIVE_SECONDS", 0.1)
    headers = bearer(key, accept="text/event-stream")
    with httpx.stream("GET", f"{url}{JOBS}/{running}/events", headers=headers) as stream:
        parts = stream.iter_text()
        assert any("ping" in part for part in parts)
        end()
        for _ in parts:  # to its end
            pass
    assert httpx.get(f"{url}{JOBS}/{running}/events", headers=headers).status_code == 401


def test_a_stream_to_a_page_ends_with_the_logout_and_no_other(
    world: Published, url: str, running: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_KEEPALIVE_SECONDS", 0.1)
    browsers = [httpx.Client(base_url=url, headers={"accept": "text/html"}) for _ in range(2)]
    with browsers[0] as leaving, browsers[1] as staying:
        for browser in browsers:
            assert browser.post("/login", data={"key": key}).status_code == 303
        token = re.search(r'name="form_token" value="(\w+)"', leaving.get("/jobs").text)
        assert token is not None
        events = {"accept": "text/event-stream"}
        with (
            leaving.stream("GET", f"/jobs/{running}/events", headers=events) as ended,
            staying.stream("GET", f"/jobs/{running}/events", headers=events) as open_still,
        ):
            parts, others = ended.iter_text(), open_still.iter_text()
            assert any("ping" in part for part in parts)
            assert leaving.post("/logout", data={"form_token": token[1]}).status_code == 303
            for _ in parts:  # to its end
                pass
            assert [next(others) for _ in range(5)], "the other browser reads on"


def test_a_wait_is_not_answered(world: Published, url: str, running: str, key: str, end: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(httpx.get, f"{url}{JOBS}/{running}", params={"wait": 1}, headers=bearer(key))
        until("it waits", lambda: running in world.app.state.notifications._waiters)
        end()
        assert waits.result().status_code == 401


@pytest.mark.parametrize("coding", ["identity", "gzip"])
@pytest.mark.parametrize("path", ["export?format=jsonl", "export?format=parquet", "weights?stream=true"])
def test_a_download_ends_between_pieces_and_not_as_if_it_were_whole(
    world: Published,
    url: str,
    key: str,
    end: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    coding: str,
    path: str,
) -> None:
    read: list[int] = []
    weights = repository.weights

    def then_end(session: Any, job_id: str, start: int, stop: int) -> Any:
        read.append(start)
        if len(read) == 2:
            end()
        return weights(session, job_id, start, stop)

    monkeypatch.setattr(repository, "weights", then_end)
    with (
        httpx.stream(
            "GET", f"{url}{JOBS}/{world.job_id}/{path}", headers=bearer(key, **{"accept-encoding": coding})
        ) as found,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        found.read()
    assert found.status_code == 200
    assert len(read) == 2, "of three pieces"


def test_an_upload_is_not_kept(world: Published, url: str, key: str, end: Callable[[], None]) -> None:
    row = b'{"text": "kept by nobody"}\n'
    before = world.call("GET", DATASETS).json()
    with connected(url) as connection:
        connection.head("POST", f"{DATASETS}?name=late", content_length=str(2 * len(row)), **bearer(key))
        connection.send(row)
        until("it was admitted", lambda: world.call("GET", f"/v1/keys/{key_id(world, key)}").json()["last_used_at"])
        end()
        connection.send(row)
        assert connection.answer()[0] == 401
    assert world.call("GET", DATASETS).json() == before
