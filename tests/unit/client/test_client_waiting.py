"""How the client waits: for the end of a job, for its events, and for rows that a worker renders."""

import json
from typing import Any

import httpx
import pytest
from support.scripted_server import Chunks, Connect, Server, page, plain

from winnow import JobFailed, Unreachable


def states(*jobs: dict[str, Any]) -> list[httpx.Response]:
    return [httpx.Response(200, json={"id": "job_1"} | job, headers={"Retry-After": "3"}) for job in jobs]


def test_wait_reports_changes(connect: Connect, pauses: list[float]) -> None:
    server = Server(*states(*({"status": s} for s in ("queued", "running", "running", "succeeded"))))
    seen: list[str] = []
    with connect(server) as winnow:
        found = winnow.wait("job_1", on_update=lambda job: seen.append(job["status"]), poll_seconds=3)
    assert found["status"] == "succeeded"
    assert seen == ["queued", "running", "succeeded"]
    assert server.params == [{}, *[{"wait": "3"}] * 3]
    assert len(pauses) == 2  # this server does not hold the request: the client does not repeat it at once
    assert all(1 < pause <= 2 for pause in pauses)


def test_wait_leaves_the_waiting_to_the_service(connect: Connect) -> None:
    server = Server(*states({"status": "queued"}, {"status": "succeeded"}))
    with connect(server, timeout=10) as winnow:
        winnow.wait("job_1")
    assert server.params[1] == {"wait": "30"}
    assert server.requests[1].extensions["timeout"]["read"] == 40


def test_wait_polls_at_the_given_interval(connect: Connect, pauses: list[float]) -> None:
    server = Server(*states({"status": "queued"}, {"status": "succeeded"}))
    with connect(server) as winnow:
        winnow.wait("job_1", on_update=print, poll_seconds=0.1)
    assert pauses == [0.1]
    assert server.params[1] == {}


OUT_OF_MEMORY = {"code": "out_of_memory", "detail": "The device has no memory left."}


@pytest.mark.parametrize(("status", "error"), [("failed", OUT_OF_MEMORY), ("cancelled", None)])
def test_wait_raises_how_the_job_has_ended(connect: Connect, status: str, error: Any) -> None:
    server = Server(*states({"status": status, "error": error}))
    with (
        connect(server) as winnow,
        pytest.raises(JobFailed, match=error["code"] if error else "job_1 was cancelled") as caught,
    ):
        winnow.wait("job_1")
    assert plain(caught.value.problem) == error
    assert (caught.value.code, caught.value.job["status"]) == (error["code"] if error else "cancelled", status)


def test_wait_gives_up_in_time(connect: Connect) -> None:
    with connect(Server(*states({"status": "running"}))) as winnow, pytest.raises(TimeoutError, match="still running"):
        winnow.wait("job_1", timeout=0)


def test_wait_polls_once_more_when_time_is_up(connect: Connect, pauses: list[float]) -> None:
    with connect(Server(*states({"status": "running"}, {"status": "succeeded"}))) as winnow:
        winnow.wait("job_1", timeout=1)
    assert 0 < pauses[0] <= 1


def stream(*events: dict[str, Any], broken: bool = False) -> httpx.Response:
    sent = (f"event: {e['type']}\ndata: {json.dumps(e)}\nid: {e['id']}\n\n".encode() for e in events)
    return httpx.Response(200, stream=Chunks(b"retry: 2000\n\n", *sent, b": ping\n\n", broken=broken))


def test_follow_continues_an_interrupted_stream(connect: Connect, pauses: list[float]) -> None:
    events = [{"id": 7, "type": "job.running"}, {"id": 9, "type": "unit.claimed"}, {"id": 12, "type": "job.failed"}]
    server = Server(stream(*events[:2], broken=True), stream(), stream(events[2]))
    with connect(server) as winnow:
        assert plain(list(winnow.follow("job_1"))) == events
    assert [request.headers["last-event-id"] for request in server.requests] == ["0", "9", "9"]
    assert {request.headers["accept"] for request in server.requests} == {"text/event-stream"}
    assert pauses == [2.0, 2.0]


def test_follow_ends_where_there_is_nothing_more(connect: Connect) -> None:
    with connect(Server(httpx.Response(204))) as winnow:
        assert list(winnow.follow("job_1", after=12)) == []


def test_follow_gives_up_on_streams_that_send_nothing(connect: Connect) -> None:
    server = Server(*[httpx.Response(200, stream=Chunks(broken=True)) for _ in range(3)])
    with connect(server, retries=2) as winnow, pytest.raises(Unreachable):
        list(winnow.follow("job_1"))
    assert server.script == []


def _pending(detail: str) -> httpx.Response:
    return httpx.Response(202, json={"object": "dataset.rows.pending", "status": "pending", "detail": detail})


def test_rows_as_a_model_sees_them_are_waited_for(connect: Connect, pauses: list[float]) -> None:
    first, second = page([{"index": 0}, {"index": 1}], 1, True), page([{"index": 2}], 2, True)
    server = Server(_pending("no worker"), _pending("no worker"), _pending("it runs"), first, second)
    told: list[str] = []
    with connect(server) as winnow:
        rows = winnow.rows("d", model="m", limit=3, template_arguments={"a": 1}, max_length=32, on_wait=told.append)
        assert [row["index"] for row in rows] == [0, 1, 2]
    assert told == ["no worker", "it runs"]
    assert len(pauses) == 3, "a service that does not hold requests is not asked without a pause"
    common = {"model": "m", "template_arguments": '{"a": 1}', "max_length": "32", "wait": "20"}
    assert server.params == [{**common, "limit": "3"}] * 4 + [{**common, "limit": "1", "after": "1"}]


def test_rows_that_no_worker_renders_are_given_up(connect: Connect) -> None:
    server = Server(*[_pending("no worker is running")] * 2)
    with connect(server) as winnow, pytest.raises(TimeoutError, match="no worker is running"):
        list(winnow.rows("d", model="m", timeout=0))
    assert "wait" not in server.params[0]
