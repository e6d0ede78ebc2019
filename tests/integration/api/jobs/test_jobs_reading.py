"""Lists, progress and events of jobs, and cancelling them."""

from typing import Any

import pytest
from support.job_requests import ROWS, URL, posted, problem, set_status, upload
from support.world import World

from service import ledger
from service.ledger.state import JobStatus


def test_pages_hold_every_job_once_newest_first(api: World, body: dict[str, Any]) -> None:
    ids = {posted(api.client, body)["id"] for _ in range(5)}
    posted(api.other, {**body, "pool": upload(api.other), "target": upload(api.other)})
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = api.client.get(URL, params={"limit": 2, **after}).json()
        seen += [job["id"] for job in page["data"]]
        assert page["object"] == "list"
        assert page["last_id"] == seen[-1]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert seen == sorted(ids, reverse=True)
    beyond = api.client.get(URL, params={"after": seen[-1]}).json()
    assert beyond == {"object": "list", "data": [], "has_more": False, "last_id": None}
    assert api.client.get(URL, params={"limit": 5}).json()["has_more"] is False


def test_the_list_holds_what_the_job_itself_answers(api: World, body: dict[str, Any]) -> None:
    jobs = [posted(api.client, body) for _ in range(2)]
    listed = api.client.get(URL).json()["data"]
    assert sorted(listed, key=lambda job: job["id"]) == sorted(jobs, key=lambda job: job["id"])


def test_the_list_can_be_cut_to_one_state(api: World, body: dict[str, Any]) -> None:
    ways = {
        "queued": (),
        "running": ("running",),
        "cancelling": ("running", "cancelling"),
        "succeeded": ("running", "succeeded"),
        "failed": ("running", "failed"),
        "cancelled": ("cancelled",),
    }
    ids = {}
    for status, steps in ways.items():
        ids[status] = posted(api.client, body)["id"]
        set_status(api, ids[status], *steps)
    assert set(ways) == set(JobStatus)
    for status, job_id in ids.items():
        page = api.client.get(URL, params={"status": status}).json()
        assert [(job["id"], job["status"]) for job in page["data"]] == [(job_id, status)]
    problem(api.client.get(URL, params={"status": "paused"}), 422, "invalid_request")


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("limit", value) for value in ("0", "1001", "x")),
        *(("after", value) for value in ("", "job_", "\0", "ds_" + "0" * 32, "job_" + "0" * 32 + "\n")),
    ],
)
def test_an_invalid_page_is_refused(api: World, param: str, value: str) -> None:
    assert problem(api.client.get(URL, params={param: value}), 422, "invalid_request")["param"] == param


def test_a_failed_job_says_why_and_need_not_be_polled(api: World, body: dict[str, Any]) -> None:
    job_id = posted(api.client, body)["id"]
    set_status(api, job_id, "running", "failed")
    response = api.client.get(f"{URL}/{job_id}")
    error = {"code": "broken", "detail": "It broke.", "stage": "embed", "shard": 2, "attempts": None, "history": []}
    assert response.json()["error"] == {**error, "unusable": None}
    assert "retry-after" not in response.headers


def test_a_running_job_reports_its_phase_and_progress(api: World, running: tuple[str, ledger.Claim]) -> None:
    job_id, claim = running
    with api.sessions.begin() as session:
        ledger.beat(session, claim, lease_seconds=600, done=11)
    job = api.client.get(f"{URL}/{job_id}").json()
    assert (job["status"], job["phase"]) == ("running", "prepare")
    seconds_left = job["progress"].pop("seconds_left")
    assert job["progress"] == {"phase": "prepare", "done": 11, "total": ROWS + 4, "unit": "samples"}
    assert seconds_left >= 0
    assert (job["stages"][0]["units_done"], job["stages"][0]["seconds"]) == (0, None)


def test_a_finished_stage_reports_its_seconds_and_what_was_found(api: World, running: tuple[str, ledger.Claim]) -> None:
    job_id, claim = running
    with api.sessions.begin() as session:
        job = ledger.lock_claim(session, claim)
        ledger.finish_unit(session, job, claim, {"reused": True})
    stage = api.client.get(f"{URL}/{job_id}").json()["stages"][0]
    assert (stage["units"], stage["units_done"], stage["units_reused"]) == (1, 1, 1)
    assert stage["done"] == stage["total"] == ROWS + 4
    assert stage["seconds"] >= 0


def test_events_come_in_pages_oldest_first(api: World, body: dict[str, Any]) -> None:
    job_id = posted(api.client, body)["id"]
    posted(api.client, body)
    with api.sessions.begin() as session:
        for i in range(4):
            ledger.add_event(session, job_id, "test.event", i=i)
    path = f"{URL}/{job_id}/events"
    first = api.client.get(path, params={"limit": 3}).json()
    assert first["has_more"] is True
    rest = api.client.get(path, params={"limit": 3, "after": first["last_id"]}).json()
    assert rest["has_more"] is False
    events = first["data"] + rest["data"]
    assert [event["type"] for event in events][:2] == ["job.queued", "job.planned"]
    assert [event["data"] for event in events][2:] == [{"i": 0}, {"i": 1}, {"i": 2}, {"i": 3}]
    assert [event["id"] for event in events] == sorted({event["id"] for event in events})
    empty = api.client.get(path, params={"after": rest["last_id"]}).json()
    assert empty == {"object": "list", "data": [], "has_more": False, "last_id": None}
    for after in (-1, 2**63, 10**30, "x", "\0"):
        assert problem(api.client.get(path, params={"after": after}), 422, "invalid_request")["param"] == "after"


def test_a_cancel_can_be_repeated(api: World, body: dict[str, Any]) -> None:
    job_id = posted(api.client, body)["id"]
    answers = [api.client.post(f"{URL}/{job_id}/cancel") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].json()["status"] == "cancelled"
    assert answers[0].json() == answers[1].json() == answers[2].json() == api.client.get(f"{URL}/{job_id}").json()
    events = api.client.get(f"{URL}/{job_id}/events").json()["data"]
    assert [event["type"] for event in events].count("job.cancelled") == 1


def test_a_job_at_work_is_cancelled_in_two_steps(api: World, running: tuple[str, ledger.Claim]) -> None:
    job_id, claim = running
    for _ in range(2):
        assert api.client.post(f"{URL}/{job_id}/cancel").json()["status"] == "cancelling"
    with api.sessions.begin() as session:
        ledger.release_unit(session, claim, reason="cancelled")
    assert api.client.post(f"{URL}/{job_id}/cancel").json()["status"] == "cancelled"


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_a_cancel_leaves_an_ended_job_as_it_is(api: World, body: dict[str, Any], status: str) -> None:
    job_id = posted(api.client, body)["id"]
    set_status(api, job_id, "running", status)
    before = api.client.get(f"{URL}/{job_id}").json()
    answer = api.client.post(f"{URL}/{job_id}/cancel")
    assert (answer.status_code, answer.json()) == (200, before)
