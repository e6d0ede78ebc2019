"""The Python client against a scripted server."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import client as client_module
from service.client import JobFailed, Unreachable, Winnow, WinnowError

Handler = Callable[[httpx.Request], httpx.Response]

PROBLEM = {
    "type": "about:blank",
    "title": "Invalid request",
    "status": 422,
    "code": "invalid_rows",
    "detail": "line 2: has no known form",
    "param": "line 2",
    "errors": [{"param": "line 2", "message": "has no known form"}],
    "request_id": "req_1",
}


def problem(status: int = 422, headers: dict[str, str] | None = None, **changed: Any) -> httpx.Response:
    content = json.dumps(PROBLEM | {"status": status} | changed)
    return httpx.Response(
        status, content=content, headers={"Content-Type": "application/problem+json", **(headers or {})}
    )


class Server:
    """Answers with what the script holds, in turn, and remembers what was asked."""

    def __init__(self, *script: httpx.Response | Exception | Handler) -> None:
        self.script = list(script)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step if isinstance(step, httpx.Response) else step(request)

    def client(self, **options: Any) -> Winnow:
        return Winnow("http://winnow.test/", "wnw_key", transport=httpx.MockTransport(self), **options)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client does not sleep; how long it would have is kept here."""
    slept: list[float] = []
    monkeypatch.setattr(client_module.time, "sleep", slept.append)
    return slept


def page(data: list[Any], last: Any, has_more: bool) -> httpx.Response:
    return httpx.Response(200, json={"object": "list", "data": data, "has_more": has_more, "last_id": last})


def test_a_request_carries_the_key() -> None:
    server = Server(httpx.Response(202, json={"id": "job_1"}))
    with server.client() as winnow:
        assert winnow.create_job(model="m", pool="a", target="b", budget=3) == {"id": "job_1"}
    request = server.requests[0]
    assert str(request.url) == "http://winnow.test/v1/selection-jobs"
    assert request.headers["authorization"] == "Bearer wnw_key"
    assert json.loads(request.content) == {"model": "m", "pool": "a", "target": "b", "budget": 3}


def test_a_file_is_uploaded_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    server = Server(httpx.ConnectError("refused"), httpx.Response(201, json={"id": "ds_1"}))
    with server.client() as winnow:
        assert winnow.upload_dataset(path)["id"] == "ds_1"
    for request in server.requests:  # the second attempt sends the file from its start
        assert request.content == b'{"text": "a"}\n'
        assert request.headers["content-length"] == "14"
        assert dict(request.url.params) == {"name": "pool.jsonl", "format": "auto"}


def test_a_plan_is_a_job_that_is_not_made() -> None:
    server = Server(httpx.Response(200, json={"object": "selection_plan"}))
    with server.client() as winnow:
        assert winnow.plan(model="m", budget=3) == {"object": "selection_plan"}
    (sent,) = server.requests
    assert (sent.method, sent.url.path) == ("POST", "/v1/selection-jobs")
    assert json.loads(sent.content) == {"model": "m", "budget": 3, "dry_run": True}


def test_the_registered_models() -> None:
    server = Server(httpx.Response(200, json={"object": "list", "data": [{"name": "tiny"}]}))
    with server.client() as winnow:
        assert winnow.models() == [{"name": "tiny"}]
    assert server.requests[0].url.path == "/v1/models"


def test_keys_are_made_listed_and_revoked_and_tell_of_their_use() -> None:
    made = httpx.Response(201, json={"id": "key_2", "key": "wnw_new"})
    pages = page([{"id": "key_2"}], "key_2", True), page([{"id": "key_1"}], "key_1", False)
    server = Server(made, *pages, httpx.Response(204), httpx.Response(200, json={"object": "usage"}))
    with server.client() as winnow:
        assert winnow.create_key("CI", scopes=["read"], expires_in_days=3)["key"] == "wnw_new"
        assert [key["id"] for key in list(winnow.keys())] == ["key_2", "key_1"]
        winnow.revoke_key("key_1")
        assert winnow.usage() == {"object": "usage"}
    assert json.loads(server.requests[0].content) == {"name": "CI", "scopes": ["read"], "expires_in_days": 3}
    assert [(r.method, str(r.url).partition("/v1/")[2]) for r in server.requests] == [
        ("POST", "keys"),
        ("GET", "keys"),
        ("GET", "keys?after=key_2"),
        ("DELETE", "keys/key_1"),
        ("GET", "usage"),
    ]


def test_content_needs_a_name() -> None:
    server = Server(httpx.Response(201, json={}))
    with server.client() as winnow:
        with pytest.raises(ValueError, match="name"):
            winnow.upload_dataset(b"x")
        winnow.upload_dataset(b"x", name="pool")
    assert server.requests[0].content == b"x"


def test_a_problem_becomes_an_error() -> None:
    with Server(problem()).client() as winnow, pytest.raises(WinnowError) as caught:
        winnow.upload_dataset(b"x", name="pool")
    error = caught.value
    assert (error.status, error.code, error.param, error.request_id) == (422, "invalid_rows", "line 2", "req_1")
    assert error.detail == "line 2: has no known form"
    assert error.errors == PROBLEM["errors"]
    assert "req_1" in str(error)


def test_an_answer_of_something_in_between_becomes_an_error() -> None:
    with Server(httpx.Response(404, text="<html>nginx")).client() as winnow, pytest.raises(WinnowError) as caught:
        winnow.job("job_1")
    assert (caught.value.status, caught.value.code) == (404, "http_error")
    assert "nginx" in caught.value.detail


def test_a_get_is_repeated(pauses: list[float]) -> None:
    server = Server(
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.Response(502, text="bad gateway"),
        problem(503, {"Retry-After": "7"}),
        httpx.Response(200, json={"id": "job_1"}),
    )
    with server.client() as winnow:
        assert winnow.job("job_1") == {"id": "job_1"}
    assert pauses[-1] == 7.0
    assert 0.25 <= pauses[0] <= 0.75
    assert 0.5 <= pauses[1] <= 1.5
    assert 1.0 <= pauses[2] <= 3.0


@pytest.mark.parametrize("status", [400, 409, 500])
def test_a_get_that_was_refused_is_not_repeated(status: int) -> None:
    server = Server(problem(status))
    with server.client() as winnow, pytest.raises(WinnowError):
        winnow.results("job_1")


FAILURES = [httpx.ReadTimeout("slow"), httpx.ReadError("reset"), problem(503), problem(429)]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_post_that_may_have_arrived_is_repeated_under_its_key(failure: Any) -> None:
    again = problem(409, code="idempotency_key_in_use")
    server = Server(failure, again, *[httpx.Response(200, json={"id": "job_1"})] * 2)
    with server.client() as winnow:
        assert winnow.cancel("job_1")["id"] == winnow.cancel("job_1")["id"] == "job_1"
    keys = [request.headers["Idempotency-Key"] for request in server.requests]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_an_upload_that_may_have_arrived_is_repeated_under_its_key() -> None:
    server = Server(httpx.ReadError("reset"), *[httpx.Response(201, json={"id": "ds_1"})] * 2)
    with server.client() as winnow:
        assert winnow.upload_dataset(b"{}", "d") == winnow.upload_dataset(b"{}", "d")
    keys = [request.headers["Idempotency-Key"] for request in server.requests]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_delete_that_may_have_arrived_is_not_repeated(failure: Any) -> None:
    server = Server(failure)
    with server.client() as winnow, pytest.raises(WinnowError):
        winnow.delete_job("job_1")
    assert len(server.requests) == 1


@pytest.mark.parametrize("headers", [{"x-should-retry": "false"}, {"Retry-After": "31"}])
def test_what_is_of_no_use_now_is_not_repeated(headers: dict[str, str]) -> None:
    server = Server(problem(429, headers))
    with server.client() as winnow, pytest.raises(WinnowError):
        winnow.create_job()
    assert len(server.requests) == 1


def test_a_delete_is_repeated_where_no_connection_was_made() -> None:
    server = Server(httpx.ConnectTimeout("slow"), httpx.Response(204))
    with server.client() as winnow:
        winnow.delete_job("job_1")


def test_a_server_that_is_away_is_named() -> None:
    server = Server(*[httpx.ConnectError("refused")] * 3)
    with server.client(retries=2) as winnow, pytest.raises(Unreachable, match=r"winnow\.test/v1/selection.*refused"):
        winnow.job("job_1")
    assert server.script == []


def test_lists_go_through_their_pages() -> None:
    server = Server(page([{"id": "b"}], "b", True), page([{"id": "a"}], "a", False))
    with server.client() as winnow:
        assert list(winnow.jobs(status="running")) == [{"id": "b"}, {"id": "a"}]
    assert dict(server.requests[0].url.params) == {"status": "running"}
    assert dict(server.requests[1].url.params) == {"status": "running", "after": "b"}


def test_selected_samples_go_through_their_pages() -> None:
    server = Server(page([{"rank": 0}], 0, True), page([], None, False))
    with server.client() as winnow:
        assert list(winnow.selected("job_1")) == [{"rank": 0}]
    assert dict(server.requests[1].url.params) == {"after": "0"}


@pytest.mark.parametrize("method", ["datasets", "events"])
def test_other_lists(method: str) -> None:
    arguments = ["job_1"] if method == "events" else []
    with Server(page([{"id": 1}], 1, False)).client() as winnow:
        assert list(getattr(winnow, method)(*arguments)) == [{"id": 1}]


def test_deleting_has_no_answer_to_read() -> None:
    server = Server(httpx.Response(204))
    with server.client() as winnow:
        winnow.delete_dataset("ds_1")
    assert (server.requests[0].method, server.requests[0].url.path) == ("DELETE", "/v1/datasets/ds_1")


def states(*jobs: dict[str, Any], retry_after: str = "3") -> list[httpx.Response]:
    return [httpx.Response(200, json={"id": "job_1"} | job, headers={"Retry-After": retry_after}) for job in jobs]


def test_wait_tells_of_changes(pauses: list[float]) -> None:
    server = Server(
        *states({"status": "queued"}, {"status": "running"}, {"status": "running"}, {"status": "succeeded"})
    )
    seen: list[str] = []
    with server.client() as winnow:
        found = winnow.wait("job_1", on_update=lambda job: seen.append(job["status"]), poll_seconds=3)
    assert found["status"] == "succeeded"
    assert seen == ["queued", "running", "succeeded"]
    assert [dict(request.url.params) for request in server.requests] == [{}, *[{"wait": "3"}] * 3]
    assert len(pauses) == 2  # the server holds nothing here: the client does not ask again at once
    assert all(1 < pause <= 2 for pause in pauses)


def test_wait_leaves_the_waiting_to_the_service() -> None:
    server = Server(*states({"status": "queued"}, {"status": "succeeded"}))
    with server.client(timeout=10) as winnow:
        winnow.wait("job_1")
    assert dict(server.requests[1].url.params) == {"wait": "30"}
    assert server.requests[1].extensions["timeout"]["read"] == 40


def test_wait_polls_as_the_caller_asks(pauses: list[float]) -> None:
    server = Server(*states({"status": "queued"}, {"status": "succeeded"}))
    with server.client() as winnow:
        winnow.wait("job_1", on_update=print, poll_seconds=0.1)
    assert pauses == [0.1]
    assert dict(server.requests[1].url.params) == {}


def test_wait_raises_what_failed() -> None:
    error = {"code": "out_of_memory", "detail": "The device has no memory left."}
    with Server(*states({"status": "failed", "error": error})).client() as winnow, pytest.raises(JobFailed) as caught:
        winnow.wait("job_1")
    assert caught.value.problem == error
    assert (caught.value.code, caught.value.job["status"]) == ("out_of_memory", "failed")


def test_wait_raises_when_cancelled() -> None:
    with Server(*states({"status": "cancelled", "error": None})).client() as winnow:
        with pytest.raises(JobFailed, match="job_1 was cancelled") as caught:
            winnow.wait("job_1")
        assert caught.value.code == "cancelled"


def test_wait_gives_up_in_time() -> None:
    with Server(*states({"status": "running"})).client() as winnow, pytest.raises(TimeoutError, match="still running"):
        winnow.wait("job_1", timeout=0)


def test_wait_polls_once_more_when_time_is_up(pauses: list[float]) -> None:
    with Server(*states({"status": "running"}, {"status": "succeeded"})).client() as winnow:
        winnow.wait("job_1", timeout=1)
    assert 0 < pauses[0] <= 1


def stream(*events: dict[str, Any], broken: bool = False) -> httpx.Response:
    sent = (f"event: {e['type']}\ndata: {json.dumps(e)}\nid: {e['id']}\n\n".encode() for e in events)
    return httpx.Response(200, stream=Chunks(b"retry: 2000\n\n", *sent, b": ping\n\n", broken=broken))


def test_follow_goes_on_where_a_stream_broke_off(pauses: list[float]) -> None:
    events = [{"id": 7, "type": "job.running"}, {"id": 9, "type": "unit.claimed"}, {"id": 12, "type": "job.failed"}]
    server = Server(stream(*events[:2], broken=True), stream(), stream(events[2]))
    with server.client() as winnow:
        assert list(winnow.follow("job_1")) == events
    assert [request.headers["last-event-id"] for request in server.requests] == ["0", "9", "9"]
    assert {request.headers["accept"] for request in server.requests} == {"text/event-stream"}
    assert pauses == [2.0, 2.0]


def test_follow_ends_where_there_is_nothing_more() -> None:
    with Server(httpx.Response(204)).client() as winnow:
        assert list(winnow.follow("job_1", after=12)) == []


def test_follow_gives_up_on_streams_that_send_nothing() -> None:
    server = Server(*[httpx.Response(200, stream=Chunks(broken=True)) for _ in range(3)])
    with server.client(retries=2) as winnow, pytest.raises(Unreachable):
        list(winnow.follow("job_1"))
    assert server.script == []


class Chunks(httpx.SyncByteStream):
    """A body that comes in pieces, and perhaps breaks off."""

    def __init__(self, *chunks: bytes, broken: bool = False) -> None:
        self.chunks, self.broken, self.closed = chunks, broken, False

    def __iter__(self) -> Iterator[bytes]:
        yield from self.chunks
        if self.broken:
            raise httpx.RemoteProtocolError("incomplete chunked read")

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("asked", "params"), [({}, {"landmarks": "10"}), ({"landmarks": 3, "target": 0}, {"landmarks": "3", "target": "0"})]
)
def test_a_sample_is_asked_for_by_its_index(asked: dict[str, int], params: dict[str, str]) -> None:
    server = Server(httpx.Response(200, json={"index": 7}))
    with server.client() as winnow:
        assert winnow.sample("job_1", 7, **asked) == {"index": 7}
    assert server.requests[0].url.path == "/v1/selection-jobs/job_1/samples/7"
    assert dict(server.requests[0].url.params) == params


def test_weights_are_read_from_a_stream() -> None:
    body = Chunks(b'{"index":0,"id":"a', '\u2028"}\n{"index"'.encode(), b":1}\n")
    server = Server(httpx.Response(200, stream=body))
    with server.client() as winnow:
        assert list(winnow.weights("job_1")) == [{"index": 0, "id": "a\u2028"}, {"index": 1}]
    assert dict(server.requests[0].url.params) == {"stream": "true"}
    assert body.closed


def test_a_stream_that_breaks_off_is_told() -> None:
    with Server(httpx.Response(200, stream=Chunks(b'{"index":0}\n', broken=True))).client() as winnow:
        rows = winnow.weights("job_1")
        assert next(rows) == {"index": 0}
        with pytest.raises(Unreachable, match="incomplete"):
            next(rows)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_export_takes_the_format_from_the_suffix(tmp_path: Path, suffix: str) -> None:
    server = Server(httpx.Response(200, stream=Chunks(b"ab", b"c")))
    with server.client() as winnow:
        path = winnow.export("job_1", tmp_path / f"out.{suffix}", selected_only=True)
    assert path.read_bytes() == b"abc"
    assert dict(server.requests[0].url.params) == {"format": suffix, "selected_only": "true"}


def test_export_passes_what_to_include(tmp_path: Path) -> None:
    server = Server(httpx.Response(200, content=b"x"))
    with server.client() as winnow:
        winnow.export("job_1", tmp_path / "out", format="jsonl", include="messages")
    assert dict(server.requests[0].url.params) == {"format": "jsonl", "selected_only": "false", "include": "messages"}


def test_an_export_that_breaks_off_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("before")
    with Server(httpx.Response(200, stream=Chunks(b"x", broken=True))).client() as winnow, pytest.raises(Unreachable):
        winnow.export("job_1", path)
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"]
    assert path.read_text() == "before"


def test_export_needs_a_format(tmp_path: Path) -> None:
    with Server().client() as winnow, pytest.raises(ValueError, match=r"\.jsonl, \.csv, \.parquet"):
        winnow.export("job_1", tmp_path / "out.xlsx")
