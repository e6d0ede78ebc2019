"""How the client sends a large file in parts, against a scripted server, and how an upload's progress is shown."""

import hashlib
import io
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from support.scripted_server import Connect, Server, problem

from winnow import Unreachable, UploadProgress, WinnowError
from winnow.upload_bar import uploading

CONTENT = bytes(range(250))
PART = 100


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("winnow.uploading.PARTS_FROM", len(CONTENT))


def upload(received: int, **more: Any) -> dict[str, Any]:
    return {"id": "up_1", "bytes": 250, "part_bytes": PART, "parts": 3, "received": received, "rows_read": 0, **more}


def ok(received: int) -> httpx.Response:
    return httpx.Response(200, json=upload(received))


def dataset() -> httpx.Response:
    return httpx.Response(201, json={"id": "ds_1"})


def sent(server: Server) -> list[str]:
    return [f"{request.method} {request.url.path.removeprefix('/v1/')}" for request in server.requests]


def test_a_large_file_is_sent_in_parts(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(CONTENT)
    server = Server(ok(0), ok(1), ok(2), ok(3), dataset())
    seen: list[UploadProgress] = []
    with connect(server) as winnow:
        assert winnow.upload_dataset(path, on_bad_row="skip", on_progress=seen.append)["id"] == "ds_1"
    parts = [f"PUT uploads/up_1/parts/{number}" for number in range(3)]
    assert sent(server) == ["POST uploads", *parts, "POST datasets"]
    assert (
        server.requests[0].read()
        == httpx.Request("POST", "http://x", json={"bytes": 250, "sha256": hashlib.sha256(CONTENT).hexdigest()}).read()
    )
    assert [request.content for request in server.requests[1:4]] == [CONTENT[:100], CONTENT[100:200], CONTENT[200:]]
    assert [request.headers["content-length"] for request in server.requests[1:4]] == ["100", "100", "50"]
    assert server.params[-1] == {"name": "pool.jsonl", "on_bad_row": "skip", "upload": "up_1"}
    assert server.requests[-1].content == b""
    assert [(at.step, at.done) for at in seen] == [
        ("checksum", 250),
        ("send", 100),
        ("send", 200),
        ("send", 250),
    ]
    assert {at.total for at in seen} == {250}


def test_what_had_come_before_is_not_sent_again(connect: Connect) -> None:
    server = Server(ok(2), ok(3), dataset())
    with connect(server) as winnow:
        winnow.upload_dataset(CONTENT, "pool")
    assert sent(server) == ["POST uploads", "PUT uploads/up_1/parts/2", "POST datasets"]
    server = Server(ok(3), dataset())
    with connect(server) as winnow:
        winnow.upload_dataset(CONTENT, "pool")
    assert sent(server) == ["POST uploads", "POST datasets"]


def test_a_part_whose_answer_was_lost_is_looked_up(connect: Connect) -> None:
    lost = httpx.ReadError("reset"), problem(409, code="part_not_next")
    server = Server(ok(0), *lost, ok(1), ok(2), ok(3), dataset())
    with connect(server) as winnow:
        winnow.upload_dataset(CONTENT, "pool")
    numbers = [path.rpartition("/")[2] for path in sent(server) if path.startswith("PUT")]
    assert numbers == ["0", "0", "1", "2"]
    assert {request.content for request in server.requests[1:3]} == {CONTENT[:100]}
    assert sent(server)[3] == "GET uploads/up_1"


def test_a_part_is_retried_twice_as_often_and_then_its_error_says_how_to_go_on(connect: Connect) -> None:
    server = Server(ok(0), ok(1), *[httpx.ConnectError("refused")] * 5)
    with connect(server, retries=2) as winnow, pytest.raises(Unreachable, match="100 of 250 bytes"):
        winnow.upload_dataset(CONTENT, "pool")
    assert server.script == []


def test_a_refusal_of_a_part_is_an_error(connect: Connect) -> None:
    server = Server(ok(0), problem(404, code="upload_not_found"))
    with connect(server) as winnow, pytest.raises(WinnowError) as caught:
        winnow.upload_dataset(CONTENT, "pool")
    assert caught.value.code == "upload_not_found"


def test_a_dataset_that_an_interrupted_request_still_makes_is_waited_for(
    connect: Connect,
    pauses: list[float],
) -> None:
    in_use = {"code": "upload_in_use", "headers": {"x-should-retry": "true"}}
    steps = httpx.Response(504, text="gateway"), *(problem(409, **in_use) for _ in range(9))
    server = Server(ok(3), *steps, dataset())
    with connect(server, retries=1) as winnow:
        assert winnow.upload_dataset(CONTENT, "pool")["id"] == "ds_1"
    assert len({request.headers["Idempotency-Key"] for request in server.requests[1:]}) == 1
    assert len(pauses) == 10


def test_a_file_that_shrinks_is_refused(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(CONTENT)

    def shrink(at: UploadProgress) -> None:
        if at.step == "checksum":
            path.write_bytes(CONTENT[:50])

    with connect(Server(ok(0))) as winnow, pytest.raises(ValueError, match="shorter"):
        winnow.upload_dataset(path, on_progress=shrink)


STEPS = [
    UploadProgress("checksum", 10_000_000, 300_000_000),
    UploadProgress("send", 200_000_000, 300_000_000),
    UploadProgress("send", 300_000_000, 300_000_000),
    UploadProgress("read", 12_345, None),
]


def shown(terminal: bool, line_seconds: float = 0) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=100)
    with uploading(console, "pool[1].jsonl", line_seconds) as on_progress:
        for step in STEPS:
            on_progress(step)
    return written.getvalue()


def test_outside_of_a_terminal_there_is_a_line_now_and_then() -> None:
    lines = shown(terminal=False).splitlines()
    assert len(lines) == len(STEPS)
    assert all(line.startswith("pool[1].jsonl: ") for line in lines)
    assert "200.0 of 300.0 MB" in lines[1]
    assert "12,345 rows" in lines[3]
    assert shown(terminal=False, line_seconds=3_600) == ""


def test_in_a_terminal_there_is_a_bar() -> None:
    bar = shown(terminal=True)
    assert "pool[1].jsonl" in bar
    assert "12,345 rows" in bar
