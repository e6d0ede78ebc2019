"""What a request may send before it is known whose it is, how much, and how slowly."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from support.raw_http import Connection, connected
from support.world import DATASETS, JOBS, World, serving
from test_limits import limited

from service.db.engine import make_engine, make_sessions
from service.http.protocol import TimedHeads
from service.settings import ApiSettings, DatabaseSettings
from service.shares import Share

MIB = 2**20
LIMIT = MIB
BUFFERED = 2**19  # a piece is counted once it is there, and has as much as the server reads at a time
NEST = b"[[],[]," * (30 * MIB // 7)
JSON = {"content-type": "application/json"}
GRACE, RATE = 0.4, 1000


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    slowest = settings.requests.model_copy(update={"grace_seconds": GRACE, "bytes_per_second": RATE})
    uploads = settings.uploads.model_copy(update={"idle_seconds": GRACE})
    return settings.model_copy(update={"requests": slowest, "uploads": uploads})


class Counted:
    """The application, with the bytes of bodies that it was given."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.bytes_read = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counting() -> Any:
            message = await receive()
            self.bytes_read += len(message.get("body", b""))
            return message

        await self._app(scope, counting, send)


@pytest.fixture
def app(api: World) -> Counted:
    return Counted(api.app)


@pytest.fixture
def url(app: Counted) -> Iterator[str]:
    with serving(app) as url:
        yield url


def pieces(content: bytes) -> Iterator[bytes]:
    """Without a length: the body is sent in chunks."""
    for start in range(0, len(content), 2**16):
        yield content[start : start + 2**16]


@pytest.mark.parametrize("framed", [bytes, pieces], ids=["announced", "chunked"])
@pytest.mark.parametrize("path", [JOBS, f"{JOBS}/job_{'0' * 32}/cancel", DATASETS, "/v1/keys", "/v1/webhooks"])
def test_not_a_byte_is_read_of_a_body_whose_sender_has_no_key(
    app: Counted, url: str, path: str, framed: Callable[[bytes], Any]
) -> None:
    answer = httpx.post(f"{url}{path}", content=framed(NEST), headers=JSON)
    assert (answer.status_code, app.bytes_read) == (401, 0)
    assert httpx.get(f"{url}/healthz").status_code == 200


@pytest.mark.parametrize(("framed", "most"), [(bytes, 0), (pieces, LIMIT + BUFFERED)], ids=["announced", "chunked"])
@pytest.mark.parametrize("path", [JOBS, f"{JOBS}/job_{'0' * 32}/cancel"])
def test_a_body_beyond_its_limit_is_refused_with_the_limit(
    api: World, app: Counted, url: str, path: str, framed: Callable[[bytes], Any], most: int
) -> None:
    answer = httpx.post(f"{url}{path}", content=framed(NEST), headers={**JSON, "authorization": f"Bearer {api.key}"})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert f"{LIMIT:,}" in answer.json()["detail"]
    assert app.bytes_read <= most


def test_an_upload_has_its_own_limit(api: World) -> None:
    rows = b"".join(b'{"id": "%d", "text": "%s"}\n' % (i, b"x" * 1000) for i in range(2 * LIMIT // 1000))
    assert api.client.post(DATASETS, params={"name": "large"}, content=rows).status_code == 201


@pytest.mark.parametrize("body", [b"{", b"[" * 10_000, b"\xff", b"nonsense"])
def test_what_is_no_json_is_not_looked_at_before_the_key(api: World, body: bytes) -> None:
    nobody = TestClient(api.app).post(JOBS, content=body, headers=JSON)
    assert nobody.status_code == 401
    assert nobody.headers["www-authenticate"] == "Bearer"
    assert api.client.post(JOBS, content=body, headers=JSON).status_code == 422


def test_the_rate_is_limited_by_the_head_alone_and_counted_once(api: World) -> None:
    client = limited(api, requests_per_minute=3)
    for _ in range(3):
        assert client.post(JOBS, content=b"{", headers=JSON).status_code == 422
    counted = Counted(api.app)
    refused = TestClient(counted, headers=client.headers).post(JOBS, content=b"{", headers=JSON)
    assert (refused.status_code, refused.json()["code"], counted.bytes_read) == (429, "rate_limited", 0)


def test_a_request_that_waited_to_be_admitted_is_next_for_its_connection(
    api: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    wait = Share.wait

    async def noting(share: Share, tenant: str, seconds: float | None = None, *, is_next: bool = False) -> None:
        if share is api.app.state.shares.connections:
            asked.append(is_next)
        await wait(share, tenant, seconds, is_next=is_next)

    monkeypatch.setattr(Share, "wait", noting)
    assert api.client.post(JOBS, json={"model": 5}).status_code == 422
    assert asked == [False, True]
    asked.clear()
    assert api.client.get(DATASETS).status_code == 200
    assert asked == [False]


def test_a_database_that_fails_before_the_body_is_read_is_said_as_always(
    api: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = make_engine(DatabaseSettings(url="postgresql://nobody@127.0.0.1:1/none"))
    monkeypatch.setattr(api.app.state, "sessions", make_sessions(nowhere))
    answer = api.client.post(JOBS, json={})
    assert (answer.status_code, answer.json()["code"]) == (503, "database_away")


def test_a_full_store_is_said_before_an_upload_is_read_whatever_its_idempotency_key(api: World) -> None:
    row = b'{"text": "abc"}\n'
    used = limited(api)
    used.post(DATASETS, params={"name": "d"}, content=row)
    client = limited(api, stored_bytes=used.get("/v1/usage").json()["stored_bytes"]["used"])
    first = {"url": DATASETS, "params": {"name": "d"}, "content": row, "headers": {"idempotency-key": "one"}}
    assert client.post(**first).status_code == 201
    app = Counted(api.app)
    counted = TestClient(app, headers=client.headers)
    refused = counted.post(DATASETS, params={"name": "d"}, content=row, headers={"idempotency-key": "two"})
    assert (refused.status_code, refused.json()["code"], app.bytes_read) == (429, "quota_exceeded", 0)
    assert counted.post(**first).status_code == 201


# Slow senders


def trickle(connection: Connection, byte: bytes, every: float) -> None:
    """In the background, for as long as somebody takes it."""

    def send() -> None:
        try:
            while True:
                connection.send(byte)
                time.sleep(every)
        except OSError:
            return

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("path", [JOBS, f"{DATASETS}?name=slow", f"{JOBS}/job_{'0' * 32}/cancel"])
def test_a_body_that_trickles_is_not_waited_for(api: World, url: str, path: str) -> None:
    """Never silent for long, and yet too slow."""
    with connected(url) as connection:
        connection.head("POST", path, authorization=f"Bearer {api.key}", content_length="100000", **JSON)
        trickle(connection, b" ", GRACE / 10)
        status, problem = connection.answer()
    assert (status, problem["code"]) == (408, "request_timeout")


def test_a_body_that_takes_its_time_but_keeps_its_rate_is_read(api: World, url: str) -> None:
    body = b"[" + b" " * 2 * RATE
    with connected(url) as connection:
        connection.head("POST", JOBS, authorization=f"Bearer {api.key}", content_length=str(len(body) + 1), **JSON)
        connection.send(body)
        time.sleep(2 * GRACE)
        connection.send(b"]")
        assert connection.answer()[0] == 422


class Impatient(TimedHeads):
    head_seconds = GRACE


@pytest.fixture
def impatient(api: World) -> Iterator[str]:
    with serving(api.app, http=Impatient) as url:
        yield url


@pytest.mark.parametrize(
    "head", [b"", b"\r\n", b"GET /healthz HTTP/1.1\r\n"], ids=["nothing", "a line break", "a part"]
)
def test_a_head_that_does_not_end_is_not_waited_for(impatient: str, head: bytes) -> None:
    with connected(impatient) as connection:
        connection.send(head)
        assert connection.is_closed_by_peer()


def test_a_head_that_trickles_is_not_waited_for(impatient: str) -> None:
    with connected(impatient) as connection:
        connection.send(b"GET /healthz HTTP/1.1\r\nx-long: ")
        trickle(connection, b"a", GRACE / 10)
        assert connection.is_closed_by_peer()


def test_requests_that_come_at_once_are_answered_in_order(api: World, url: str) -> None:
    """A head and its body, or several answers, may be written at once; none of them is lost or changes its place."""
    dataset = api.client.post(DATASETS, params={"name": "d"}, content=b'{"text": "t"}').json()["id"]
    paths = [f"{DATASETS}/{dataset}", JOBS, f"{JOBS}/job_{'0' * 32}"] * 3
    with connected(url) as connection:
        for path in paths:
            connection.head("GET", path, authorization=f"Bearer {api.key}")
        assert [connection.answer()[0] for _ in paths] == [200, 200, 404] * 3


def test_the_rest_of_a_refused_body_is_not_taken_for_ever(impatient: str) -> None:
    with connected(impatient) as connection:
        connection.head("POST", JOBS, content_length="100000000")
        assert connection.answer()[0] == 401
        trickle(connection, b" ", GRACE / 10)
        assert connection.is_closed_by_peer()


def test_a_request_that_waits_and_a_connection_that_is_used_again_are_not_cut_off(api: World, impatient: str) -> None:
    with httpx.Client(base_url=impatient, headers=api.client.headers) as client:
        dataset = client.post(DATASETS, params={"name": "d"}, content=b'{"text": "t"}').json()["id"]
        for _ in range(3):
            assert client.get(f"{DATASETS}/{dataset}").status_code == 200
            time.sleep(GRACE / 2)
