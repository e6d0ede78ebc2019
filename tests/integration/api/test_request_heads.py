"""The head of a request on the wire: how large it may be, what is malformed, and what goes with HTTP/1.1 besides."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from support.raw_http import Connection, connected
from support.world import DATASETS, JOBS, World, serving

from service.datasets.rows.template import MAX_LENGTH
from service.http.protocol import MAX_ADDRESS_BYTES, MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED, TimedHeads

HEAD = b"POST /p HTTP/1.1\r\nhost: x\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
GET = b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n"


class Echo:
    """Answers with what it was asked, once it has read the body; paths under /held wait until they are let go."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.lets_go = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope["path"])
        if scope["path"].startswith("/held"):
            while not self.lets_go:
                await asyncio.sleep(0.01)
        size, more = 0, True
        while more and scope["path"] != "/early":
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        names = [name.decode() for name, _ in scope["headers"]]
        body = json.dumps({"path": scope["path"], "query": len(scope["query_string"]), "names": names, "body": size})
        framed = [] if scope["path"] == "/unframed" else [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": framed})
        await send({"type": "http.response.body", "body": body.encode()[:7], "more_body": True})
        await send({"type": "http.response.body", "body": body.encode()[7:]})


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def url(echo: Echo) -> Iterator[str]:
    with serving(echo) as url:
        yield url
        assert httpx.get(url).status_code == 200  # whatever was sent, the next client is served


def refused(connection: Connection) -> tuple[int, str]:
    status, problem = connection.answer()
    assert problem["status"] == status
    assert problem["request_id"].startswith("req_")
    assert connection.is_closed_by_peer()
    return status, problem["code"]


@pytest.mark.parametrize(
    ("begun", "status"),
    [
        (b"GET /", 414),
        (HEAD + b"x-long: ", 431),
        (HEAD + b"x-", 431),
        (CHUNKED + b"1;", 431),
        (CHUNKED + b"1\r\nx\r\n0\r\nx-long: ", 431),
    ],
    ids=["address", "value", "name", "chunk extension", "trailer"],
)
def test_a_head_that_grows_without_an_end_is_refused(url: str, begun: bytes, status: int) -> None:
    started = time.monotonic()
    with connected(url) as connection:
        connection.send(begun)
        with suppress(ConnectionError):
            for _ in range(40):
                connection.send(b"a" * (MAX_HEAD_BYTES // 8))
        assert refused(connection)[0] == status
    assert time.monotonic() - started < TimedHeads.head_seconds  # for its size, not for its time


def lines(count: int, size: int) -> bytes:
    return b"".join(b"x-%d: %b\r\n" % (number, b"a" * size) for number in range(count))


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /?%b HTTP/1.1\r\nhost: x\r\n" % (b"a" * (MAX_ADDRESS_BYTES - 2)), 200),
        (b"GET /?%b HTTP/1.1\r\nhost: x\r\n" % (b"a" * (MAX_ADDRESS_BYTES - 1)), 414),
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + lines(22, 4096), 200),
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + lines(32, 4096), 431),
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + lines(MAX_HEADERS - 1, 1), 200),
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + lines(MAX_HEADERS, 1), 431),
    ],
)
def test_a_whole_head_has_a_most(url: str, head: bytes, status: int, pieces: int) -> None:
    head += b"\r\n"
    half = len(head) // pieces
    with connected(url) as connection:
        connection.send(head[:half])
        if pieces > 1:
            time.sleep(0.05)
            connection.send(head[half:])
        assert connection.answer()[0] == status


def test_a_refusal_reaches_who_goes_on_sending(url: str) -> None:
    with connected(url) as connection:
        connection.send(b"GET /" + b"a" * MAX_ADDRESS_BYTES * 2)
        for _ in range(20):
            connection.send(b"a" * 2**18)
        assert refused(connection) == (414, "address_too_long")


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx : y\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx: a\r\n b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx: \x00\r\n\r\n",
        b"GET / HTTP/1.1\nhost: x\n\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"transfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        CHUNKED + b"no size\r\n",
    ],
)
def test_what_is_no_request_is_answered_with_a_problem(url: str, request_: bytes) -> None:
    with connected(url) as connection:
        connection.send(request_ + GET % b"/smuggled")
        assert refused(connection) == (400, "bad_request")


def test_nothing_is_read_behind_what_is_no_request(echo: Echo, url: str) -> None:
    with connected(url) as connection:
        connection.send(HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + GET % b"/smuggled")
        refused(connection)
        with suppress(ConnectionError):
            connection.send(GET % b"/smuggled")
            time.sleep(0.2)
    assert "/smuggled" not in echo.seen


def test_a_trailer_is_no_header(url: str) -> None:
    with connected(url) as connection:
        connection.send(CHUNKED + b"3\r\nabc\r\n")
        time.sleep(0.05)  # the request is being answered, and its body read
        connection.send(b"0\r\nauthorization: Bearer x\r\n\r\n" + GET % b"/next")
        answer = connection.answer()[1]
        assert (answer["body"], answer["names"]) == (3, ["host", "transfer-encoding"])
        assert connection.answer()[1]["path"] == "/next"


def test_an_answer_that_is_owed_comes_before_the_end(echo: Echo, url: str) -> None:
    """Nonsense behind a request does not take the place of its answer."""
    with connected(url) as connection:
        connection.send(GET % b"/held" + b"nonsense\r\n\r\n")
        time.sleep(0.2)
        echo.lets_go = True
        assert connection.answer()[1]["path"] == "/held"
        assert connection.is_closed_by_peer()


def test_so_many_requests_wait_for_the_answer_to_the_first(echo: Echo, url: str) -> None:
    with connected(url) as connection:
        connection.send(GET % b"/held" + b"".join(GET % b"/%d" % number for number in range(10 * MAX_PIPELINED)))
        time.sleep(0.2)
        echo.lets_go = True
        paths = [connection.answer()[1]["path"] for _ in range(1 + MAX_PIPELINED)]
        assert connection.rest() == b""
    assert paths == ["/held", *(f"/{number}" for number in range(MAX_PIPELINED))]


def test_who_asks_whether_to_go_on_is_told_once_the_body_is_wanted(api: World, url: str) -> None:
    with connected(url) as connection:
        connection.send(HEAD + b"content-length: 3\r\nexpect: 100-continue\r\n\r\n")
        assert connection.status() == 100
        connection.read_line()
        connection.send(b"abc")
        assert connection.answer()[1]["body"] == 3
    with serving(api.app) as service, connected(service) as connection:
        connection.head("POST", JOBS, content_length="3", expect="100-continue")
        assert connection.answer()[0] == 401


@pytest.mark.parametrize("path", ["/framed", "/unframed"])
def test_a_client_of_http_1_0_gets_no_chunks(url: str, path: str) -> None:
    with connected(url) as connection:
        connection.send(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        head, _, body = connection.rest().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in head
    assert json.loads(body)["path"] == path


def test_what_follows_an_upgrade_is_not_taken_for_requests(echo: Echo, url: str) -> None:
    with connected(url) as connection:
        connection.send(
            b"GET /one HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n" + GET % b"/smuggled"
        )
        assert connection.answer()[1]["path"] == "/one"
        with suppress(ConnectionError):
            connection.send(GET % b"/smuggled")
            assert connection.rest() == b""
    assert "/smuggled" not in echo.seen


def test_a_connection_is_used_again_after_an_answer_that_did_not_wait_for_the_body(url: str) -> None:
    with connected(url) as connection:
        connection.send(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n")
        assert connection.answer()[1]["path"] == "/early"
        connection.send(b"a" * 200_000 + GET % b"/next")
        assert connection.answer()[1]["path"] == "/next"


def test_the_longest_template_of_ascii_fits_and_another_has_its_text_in_a_column(api: World) -> None:
    row = {"question": "Why?", "reply": "So."}
    fits = {"user": "{{ question }}", "assistant": "{{ reply }}", "system": ""}
    fits["system"] = "%" * (MAX_LENGTH - len(json.dumps(fits)))  # each takes three bytes of the address
    long = "為" * 8_000
    with serving(api.app) as url, httpx.Client(base_url=url, headers=api.client.headers) as client:

        def upload(template: dict[str, str], **more: str) -> httpx.Response:
            query = {"name": "d", "template": json.dumps(template, ensure_ascii=False)}
            return client.post(DATASETS, params=query, content=json.dumps({**row, **more}))

        assert len(json.dumps(fits)) == MAX_LENGTH
        assert upload(fits).status_code == 201
        with connected(url) as connection:  # httpx itself sends no longer address
            connection.head("POST", f"{DATASETS}?name=d&template=" + "%E7%82%BA" * len(long), content_length="0")
            assert refused(connection) == (414, "address_too_long")
        assert upload({**fits, "system": "{{ system_text }}"}, system_text=long).status_code == 201
