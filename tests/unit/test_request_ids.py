"""Every answer carries the request's id, and so does every line that is logged while the request runs."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from anyio.to_thread import run_sync
from support.world import make_settings

from service.app import create_app
from service.http.downloads import Download
from service.observability import logs
from service.settings import ShareSettings
from service.shares import Shares

log = logging.getLogger("service.test")
ID = "mine-1"


def lines_of_a_stream() -> Iterator[bytes]:
    for part in (b"a", b"b"):
        log.info("in the stream")
        yield part


def crash() -> None:
    log.info("in a thread")
    raise RuntimeError("a fault of ours")


async def awaited() -> str:
    await run_sync(log.info, "in another thread")
    return "x"


@pytest.fixture
def seen(caplog: pytest.LogCaptureFixture) -> Iterator[list[tuple[str, str | None]]]:
    """(message, request id) of every record."""
    found: list[tuple[str, str | None]] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append((record.getMessage(), logs.context().get("request_id")))

    handler = Note()
    root = logging.getLogger()
    root.addHandler(handler)
    for name in ("", log.name, "service.access"):
        caplog.set_level(logging.INFO, name)
    yield found
    root.removeHandler(handler)


@pytest.mark.parametrize(
    ("method", "path", "status", "logged"),
    [
        ("GET", "/healthz", 200, []),
        ("GET", "/nowhere", 404, []),
        ("PUT", "/v1/models", 405, []),
        ("GET", "/v1/models", 401, []),
        ("GET", "/stream", 200, ["in the stream", "in the stream"]),
        ("GET", "/async", 200, ["in another thread"]),
        ("GET", "/crash", 500, ["in a thread", "unforeseen error in GET /crash"]),
    ],
)
def test_answers_and_lines_carry_the_id(
    seen: list[tuple[str, str | None]], tmp_path: Path, method: str, path: str, status: int, logged: list[str]
) -> None:
    app = create_app(make_settings("postgresql://nobody@127.0.0.1:1/none", tmp_path))
    shares = Shares(ShareSettings(), connections=1)

    def stream() -> Download:
        return Download(shares, "tenant", lines_of_a_stream(), check=lambda: None, media_type="text/plain")

    app.add_api_route("/stream", stream, response_model=None)
    app.add_api_route("/crash", crash)
    app.add_api_route("/async", awaited)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://winnow.test") as client:
            return await client.request(method, path, headers={"X-Request-Id": ID})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (status, [ID])
    assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
    assert answer.headers.get_list("referrer-policy") == ["no-referrer"]
    (policy,) = answer.headers.get_list("content-security-policy")
    assert {"default-src 'none'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    if status >= 400:
        assert answer.json()["request_id"] == ID
    ours = [(message, id) for message, id in seen if not message.startswith("HTTP Request")]
    assert [message for message, _ in ours if message in logged] == logged
    assert {id for _, id in ours} == {ID}
    app.state.engine.dispose()
