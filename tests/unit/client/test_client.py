"""The Python client against a scripted server; each test runs with the synchronous and with the asynchronous client."""

import asyncio
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.scripted_server import PROBLEM, Chunks, Connect, Server, Step, page, plain, problem

from winnow import AsyncWinnow, Unreachable, Winnow, WinnowError

CALLS: list[tuple[str, Any, Callable[[Any], Any]]] = [
    ("GET models", None, lambda w: w.models()),
    ("GET targets", None, lambda w: w.targets()),
    ("POST selection-jobs", {"model": "m", "budget": 3}, lambda w: w.create_job(model="m", budget=3)),
    ("POST selection-jobs", {"budget": 3, "dry_run": True}, lambda w: w.plan(budget=3)),
    ("GET selection-jobs/j", None, lambda w: w.job("j")),
    ("POST selection-jobs/j/cancel", None, lambda w: w.cancel("j")),
    ("POST selection-jobs/j/retry", None, lambda w: w.retry("j")),
    ("POST selection-jobs/j/reproduce", None, lambda w: w.reproduce("j")),
    ("GET selection-jobs/j/results", None, lambda w: w.results("j")),
    ("GET selection-jobs/j/provenance", None, lambda w: w.provenance("j")),
    ("GET selection-jobs/j/provenance?chunks=true", None, lambda w: w.provenance("j", chunks=True)),
    ("GET selection-jobs/j/samples/7?landmarks=5", None, lambda w: w.sample("j", 7)),
    ("GET selection-jobs/j/samples?id=7&landmarks=5", None, lambda w: w.sample("j", "7")),
    ("GET selection-jobs/j/results/charts", None, lambda w: w.charts("j")),
    ("GET selection-jobs/j/samples/7?landmarks=3&target=0", None, lambda w: w.sample("j", 7, landmarks=3, target=0)),
    ("POST keys", {"name": "CI", "scopes": ["read"]}, lambda w: w.create_key("CI", scopes=["read"])),
    ("GET usage", None, lambda w: w.usage()),
    ("POST webhooks", {"url": "u", "events": []}, lambda w: w.create_webhook("u", events=[])),
    ("PATCH webhooks/w", {"enabled": False}, lambda w: w.change_webhook("w", enabled=False)),
    ("POST webhooks/w/rotate-secret", None, lambda w: w.rotate_webhook_secret("w")),
    ("POST webhooks/w/test", None, lambda w: w.test_webhook("w")),
    ("GET webhooks/w/deliveries/d", None, lambda w: w.delivery("w", "d")),
    ("POST webhooks/w/deliveries/d/replay", None, lambda w: w.replay("w", "d")),
    ("DELETE selection-jobs/j", None, lambda w: w.delete_job("j")),
    ("DELETE datasets/d", None, lambda w: w.delete_dataset("d")),
    ("DELETE uploads/u", None, lambda w: w.delete_upload("u")),
    ("DELETE keys/k", None, lambda w: w.revoke_key("k")),
    ("DELETE webhooks/w", None, lambda w: w.delete_webhook("w")),
]


@pytest.mark.parametrize(("sent", "body", "call"), CALLS)
def test_a_call_is_its_request(connect: Connect, sent: str, body: Any, call: Callable[[Any], Any]) -> None:
    is_delete = sent.startswith("DELETE")
    answer = {"id": "x", "data": [{"name": "n"}]}
    if sent == "GET webhooks/w/deliveries/d":
        answer["data"] = {}
    server = Server(httpx.Response(204) if is_delete else httpx.Response(200, json=answer))
    with connect(server) as winnow:
        found = call(winnow)
    wanted = answer["data"] if sent in ("GET models", "GET targets") else answer
    assert plain(found) == (None if is_delete else wanted)
    (request,) = server.requests
    assert f"{request.method} {str(request.url).removeprefix('http://winnow.test/v1/')}" == sent
    assert request.headers["authorization"] == "Bearer wnw_key"
    assert (json.loads(request.content) if request.content else None) == body
    assert ("Idempotency-Key" in request.headers) is sent.startswith("POST")


LISTS: list[tuple[str, dict[str, str], Callable[[Any], Any]]] = [
    ("datasets", {}, lambda w: w.datasets()),
    ("uploads", {}, lambda w: w.uploads()),
    ("datasets/d/rows", {}, lambda w: w.rows("d")),
    ("selection-jobs", {}, lambda w: w.jobs()),
    ("selection-jobs", {"status": "running"}, lambda w: w.jobs("running")),
    ("selection-jobs/j/events", {}, lambda w: w.events("j")),
    ("selection-jobs/j/selected", {}, lambda w: w.selected("j")),
    ("audit-log", {"action": "a"}, lambda w: w.audit_log(action="a", object_id=None)),
    ("keys", {}, lambda w: w.keys()),
    ("webhooks", {}, lambda w: w.webhooks()),
    ("webhooks/w/deliveries", {"state": "failed"}, lambda w: w.deliveries("w", "failed")),
]


@pytest.mark.parametrize(("path", "params", "call"), LISTS)
def test_a_list_is_read_through_its_pages(
    connect: Connect, path: str, params: dict[str, str], call: Callable[[Any], Any]
) -> None:
    entries = [{"id": 2}, {"id": 1}] if path.endswith(("events", "audit-log")) else [{"id": "b"}, {"id": "a"}]
    server = Server(page(entries[:1], 0, True), page(entries[1:], 1, True), page([], None, False))
    with connect(server) as winnow:
        assert plain(list(call(winnow))) == entries
    assert {request.url.path for request in server.requests} == {f"/v1/{path}"}
    assert server.params == [params, {**params, "after": "0"}, {**params, "after": "1"}]


def test_a_file_is_uploaded_under_its_name(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    content = b'{"text": "a"}\n' * 10_000
    path.write_bytes(content)
    server = Server(httpx.ConnectError("refused"), httpx.Response(201, json={"id": "ds_1"}))
    with connect(server) as winnow:
        assert winnow.upload_dataset(path)["id"] == "ds_1"
    for request in server.requests:  # the second attempt sends the file from its start
        assert request.content == content
        assert request.headers["content-length"] == str(len(content))
        assert "transfer-encoding" not in request.headers
    assert server.params == [{"name": "pool.jsonl"}] * 2


def test_content_needs_a_name(connect: Connect) -> None:
    server = Server(httpx.Response(201, json={}))
    with connect(server) as winnow:
        with pytest.raises(ValueError, match="name"):
            winnow.upload_dataset(b"x")
        winnow.upload_dataset(b"x", name="pool")
    assert server.requests[0].content == b"x"


def test_a_problem_becomes_an_error(connect: Connect) -> None:
    with connect(Server(problem())) as winnow, pytest.raises(WinnowError) as caught:
        winnow.upload_dataset(b"x", name="pool")
    error = caught.value
    assert (error.status, error.code, error.param, error.request_id) == (422, "invalid_rows", "line 2", "req_1")
    assert (error.detail, error.errors) == (PROBLEM["detail"], PROBLEM["errors"])
    assert "req_1" in str(error)


def test_the_answer_of_a_proxy_becomes_an_error(connect: Connect) -> None:
    with connect(Server(httpx.Response(404, text="<html>nginx"))) as winnow, pytest.raises(WinnowError) as caught:
        winnow.job("job_1")
    assert (caught.value.status, caught.value.code) == (404, "http_error")
    assert "nginx" in caught.value.detail


def test_a_get_is_retried(connect: Connect, pauses: list[float]) -> None:
    server = Server(
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.Response(502, text="bad gateway"),
        problem(503, {"Retry-After": "7"}),
        httpx.Response(200, json={"id": "job_1"}),
    )
    with connect(server) as winnow:
        assert winnow.job("job_1").id == "job_1"
    assert pauses[-1] == 7.0
    assert 0.25 <= pauses[0] <= 0.75
    assert 0.5 <= pauses[1] <= 1.5
    assert 1.0 <= pauses[2] <= 3.0


GET, POST, DELETE = (lambda w: w.results("j"), lambda w: w.cancel("j"), lambda w: w.delete_job("j"))
UPLOAD = lambda w: w.upload_dataset(b"{}", "d")  # noqa: E731
MAY_HAVE_ARRIVED: list[Callable[[], Step]] = [
    lambda: httpx.ReadTimeout("slow"),
    lambda: httpx.ReadError("reset"),
    lambda: problem(503),
    lambda: problem(429),
]


@pytest.mark.parametrize(
    ("call", "failure", "is_retried"),
    [
        *((call, failure, call is not DELETE) for call in (GET, POST, UPLOAD, DELETE) for failure in MAY_HAVE_ARRIVED),
        *((GET, lambda status=status: problem(status), False) for status in (400, 409, 500)),
        (DELETE, lambda: httpx.ConnectTimeout("slow"), True),
        (POST, lambda: problem(409, {"x-should-retry": "true"}), True),
        (GET, lambda: problem(500, {"x-should-retry": "true"}), True),
        (DELETE, lambda: problem(500, {"x-should-retry": "true"}), False),
        (POST, lambda: problem(503, {"x-should-retry": "true", "Retry-After": "31"}), False),
        (POST, lambda: problem(429, {"x-should-retry": "false"}), False),
        (POST, lambda: problem(429, {"Retry-After": "31"}), False),
    ],
)
def test_what_is_retried_and_under_which_key(
    connect: Connect, call: Callable[[Any], Any], failure: Callable[[], Step], is_retried: bool
) -> None:
    server = Server(failure(), *[httpx.Response(200, json={"id": "x"}) for _ in range(2)])
    with connect(server) as winnow:
        with nullcontext() if is_retried else pytest.raises(WinnowError):
            call(winnow)
        assert len(server.requests) == 1 + is_retried
        call(winnow)
    *keys, last = [request.headers.get("Idempotency-Key") for request in server.requests]
    assert len(set(keys)) == 1
    assert keys[0] != last if call in (POST, UPLOAD) else keys[0] is last is None


def test_a_server_that_does_not_answer_is_named(connect: Connect) -> None:
    server = Server(*[httpx.ConnectError("refused")] * 3)
    with (
        connect(server, retries=2) as winnow,
        pytest.raises(Unreachable, match=r"winnow\.test/v1/selection.*refused") as caught,
    ):
        winnow.job("job_1")
    assert (server.script, caught.value.code) == ([], "unreachable")


def test_weights_are_read_from_a_stream(connect: Connect) -> None:
    body = Chunks(b'{"index":0,"id":"a', '\u2028"}\n{"index"'.encode(), b":1}\n")
    server = Server(httpx.Response(200, stream=body))
    with connect(server) as winnow:
        assert plain(list(winnow.weights("job_1"))) == [{"index": 0, "id": "a\u2028"}, {"index": 1}]
    assert server.params == [{"stream": "true"}]
    assert body.closed


def test_a_stream_that_is_left_is_closed(connect: Connect) -> None:
    body = Chunks(b'{"index":0}\n', b'{"index":1}\n')
    with connect(Server(httpx.Response(200, stream=body))) as winnow:
        rows = winnow.weights("job_1")
        assert plain(next(rows)) == {"index": 0}
        rows.close()
        assert body.closed


def test_the_synchronous_client_works_within_a_running_event_loop() -> None:
    """As in a notebook, whose loop has hooks of its own for asynchronous generators that are left."""
    body = Chunks(b'{"index":0}\n', b'{"index":1}\n')

    async def cell() -> None:
        with Winnow("http://winnow.test", "wnw_key", transport=Server(httpx.Response(200, stream=body))) as winnow:
            rows: Any = winnow.weights("job_1")
            assert plain(next(rows)) == {"index": 0}
            rows.close()
            assert body.closed

    asyncio.run(cell())


def test_an_interrupted_stream_is_reported(connect: Connect) -> None:
    with connect(Server(httpx.Response(200, stream=Chunks(b'{"index":0}\n', broken=True)))) as winnow:
        rows = winnow.weights("job_1")
        assert plain(next(rows)) == {"index": 0}
        with pytest.raises(Unreachable, match="incomplete"):
            next(rows)


@pytest.mark.parametrize(
    ("name", "options", "params"),
    [
        *(
            (f"out.{kind}", {}, {"format": kind, "selected_only": "true", "include": "messages"})
            for kind in ("jsonl", "csv", "parquet")
        ),
        ("out.csv", {"selected_only": False, "include": None}, {"format": "csv", "selected_only": "false"}),
        (
            "out",
            {"format": "jsonl", "escape_formulas": False},
            {"format": "jsonl", "selected_only": "true", "include": "messages", "escape_formulas": "false"},
        ),
    ],
)
def test_an_export_is_written_to_its_file(
    connect: Connect, tmp_path: Path, name: str, options: dict[str, Any], params: dict[str, str]
) -> None:
    server = Server(httpx.Response(200, stream=Chunks(b"ab", b"c")))
    with connect(server) as winnow:
        path = winnow.export("job_1", tmp_path / name, **options)
    assert path.read_bytes() == b"abc"
    assert server.params == [params]


def test_an_interrupted_export_leaves_the_previous_file(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("before")
    server = Server(httpx.Response(200, stream=Chunks(b"x", broken=True)))
    with connect(server) as winnow, pytest.raises(Unreachable):
        winnow.export("job_1", path)
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"]
    assert path.read_text() == "before"


def test_export_needs_a_format(connect: Connect, tmp_path: Path) -> None:
    with connect(Server()) as winnow, pytest.raises(ValueError, match=r"\.jsonl, \.csv, \.parquet"):
        winnow.export("job_1", tmp_path / "out.xlsx")


def test_the_clients_have_the_same_documented_methods() -> None:
    methods = {name for name in dir(Winnow) if not name.startswith("_")} - {"close"}
    assert methods == {name for name in dir(AsyncWinnow) if not name.startswith("_")} - {"close"}
    assert all(getattr(Winnow, name).__doc__ for name in methods)


def test_an_upload_is_read_as_it_is_told(connect: Connect) -> None:
    server, columns, template = Server(httpx.Response(201, json={})), {"text": "a,b"}, {"user": "{{ q }}"}
    with connect(server) as winnow:
        winnow.upload_dataset(b"x", "n", "text", columns=columns, template=template, on_bad_row="skip")
    (params,) = server.params
    assert (json.loads(params.pop("columns")), json.loads(params.pop("template"))) == (columns, template)
    assert params == {"name": "n", "format": "text", "on_bad_row": "skip"}


def test_skipped_rows_are_streamed(connect: Connect) -> None:
    server = Server(httpx.Response(200, content=b'{"number": 3}\n{"number": 9}\n'))
    with connect(server) as winnow:
        assert [row["number"] for row in winnow.skipped_rows("d")] == [3, 9]
    assert server.requests[0].url.path.endswith("/datasets/d/skipped")
