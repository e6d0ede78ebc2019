"""What pages show and change: of the tenant's own alone, and every text of a user as text."""

import json
import re
from typing import Any

import pytest
from support.jobs import add_job, plain_rows, write_pool
from support.web import Visitor, visitor
from support.world import World

from service.ids import new_id
from service.ledger import add_event
from service.ledger.state import JobStatus

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> &amp; {{ 7 * 7 }}"


@pytest.fixture
def data(world: World) -> tuple[str, str]:
    """A pool and a target."""
    return world.upload(plain_rows(40), "the pool"), world.upload(plain_rows(6, "t"), "the target")


def form(one: Visitor, data: tuple[str, str], **more: str) -> dict[str, str]:
    """The form of a new job, filled."""
    page = one.get("/jobs/new").text
    hidden = dict(re.findall(r'type="hidden" name="(form_token|once)" value="([^"]+)"', page))
    return {**hidden, "do": "post", "model": "small", "pool": data[0], "target": data[1], "budget": "5", **more}


def job_of(answer: Any) -> str:
    assert answer.status_code == 303, answer.text
    found = re.fullmatch(r"/jobs/(job_[0-9a-f]{32})", answer.headers["location"])
    assert found is not None
    return found[1]


def pages_of(job: str, dataset: str) -> list[str]:
    return [
        *(f"/jobs/{job}{part}" for part in ("", "/live", "/log", "/events")),
        f"/datasets/{dataset}",
        f"/datasets/{dataset}?model=small",
    ]


def test_a_filled_form_is_a_job_and_twice_the_same_form_is_one(world: World, data: tuple[str, str]) -> None:
    one = visitor(world)
    filled = form(one, data, budget="10%", **{"landmarks.count": "8", "kernel.kind": "rbf", "validate": "false"})
    job = job_of(one.post("/jobs/new", filled))
    assert job_of(one.post("/jobs/new", filled)) == job
    made = world.get(job)
    assert (made["budget"], made["pool"], made["target"]) == (4, *data)
    used = made["parameters"]
    assert (used["landmarks"]["count"], used["kernel"]["kind"], used["validate"]) == (8, "rbf", False)
    assert job_of(one.post("/jobs/new", {**filled, "budget": "6"})) != job
    assert len(world.call("GET", "/v1/selection-jobs").json()["data"]) == 2


@pytest.mark.parametrize(
    ("changed", "at"),
    [
        ({"budget": ""}, "budget"),
        ({"budget": "many"}, "budget"),
        ({"budget": "41"}, "budget"),
        ({"model": "nobody"}, "model"),
        ({"pool": "ds_" + "0" * 32}, "pool"),
        ({"landmarks.count": "1"}, "landmarks.count"),
        ({"method": "random", "kernel.kind": "rbf"}, ""),
        ({"seed": "-1"}, "seed"),
    ],
)
def test_what_is_wrong_is_said_at_its_field_and_nothing_is_lost(
    world: World, data: tuple[str, str], changed: dict[str, str], at: str
) -> None:
    one = visitor(world)
    filled = form(one, data, **{"landmarks.count": "7", **changed})
    answer = one.post("/jobs/new", filled)
    assert answer.status_code == 422
    if at:
        assert f'id="wrong-{at}"' in answer.text
        assert re.search(rf'id="{re.escape(at)}"[^>]*aria-invalid="true"', answer.text)
    assert f'value="{filled["landmarks.count"]}"' in answer.text
    assert world.call("GET", "/v1/selection-jobs").json()["data"] == []


def test_the_plan_is_that_of_a_dry_run_and_creates_nothing(world: World, data: tuple[str, str]) -> None:
    one = visitor(world)
    answer = one.post("/jobs/new/plan", form(one, data))
    assert answer.status_code == 200
    body = {"model": "small", "pool": data[0], "target": data[1], "budget": 5, "dry_run": True}
    plan = world.call("POST", "/v1/selection-jobs", json=body).json()
    assert f"{plan['tokens']['pool']:,}" in answer.text
    for stage in plan["stages"]:
        assert stage["stage"].replace("_", " ") in answer.text
    for way in ("rds_plus", "exact_influence"):
        assert way in answer.text
    assert world.call("GET", "/v1/selection-jobs").json()["data"] == []
    shown = one.post("/jobs/new", form(one, data, do="plan"))  # without a script
    assert shown.status_code == 200
    assert f"{plan['tokens']['pool']:,}" in shown.text


def test_a_file_is_uploaded_by_a_plain_form_and_by_a_script(world: World) -> None:
    one = visitor(world)
    content = "".join(json.dumps(row) + "\n" for row in plain_rows(5)).encode()
    sent = {"role": "target", "form_token": one.form_token()}
    plain = one.post("/datasets", params=sent, files={"file": ("rows.jsonl", content)})
    assert plain.status_code == 303
    found = re.fullmatch(r"/jobs/new\?target=(ds_[0-9a-f]{32})", plain.headers["location"])
    assert found is not None
    assert world.call("GET", f"/v1/datasets/{found[1]}").json()["row_count"] == 5
    assert f'value="{found[1]}" selected' in one.get(plain.headers["location"]).text
    headers = {"accept": "application/json", "x-form-token": one.form_token()}
    script = one.post("/datasets", params={"role": "pool", "name": "mine"}, content=content, headers=headers)
    assert (script.status_code, script.json()["name"], script.json()["row_count"]) == (201, "mine", 5)
    bad = one.post("/datasets", params={"role": "pool"}, content=b'{"no": "row"}\n', headers=headers)
    assert (bad.status_code, bad.json()["code"]) == (422, "invalid_rows")
    assert one.post("/datasets", params={"role": "pool"}, content=content).status_code == 403
    assert one.post("/datasets", params={**sent, "form_token": "0" * 64}, content=content).status_code == 403


def test_a_job_is_cancelled_retried_and_deleted(world: World, data: tuple[str, str]) -> None:
    one = visitor(world)
    job = job_of(one.post("/jobs/new", form(one, data)))
    assert one.send(f"/jobs/{job}/cancel").headers["location"] == f"/jobs/{job}"
    assert world.get(job)["status"] == "cancelled"
    again = job_of(one.send(f"/jobs/{job}/retry"))
    assert world.get(again)["retry_of"] == job
    assert one.send(f"/jobs/{again}/delete").status_code == 409
    assert one.send(f"/jobs/{job}/delete").headers["location"] == "/jobs"
    assert one.get(f"/jobs/{job}").status_code == 404
    for path in ("cancel", "retry", "delete"):
        assert one.post(f"/jobs/{again}/{path}").status_code == 403


def test_a_name_and_labels_are_given_shown_and_filtered_by(world: World, data: tuple[str, str]) -> None:
    one = visitor(world)
    job = job_of(one.post("/jobs/new", form(one, data, name="lr 3e-4", labels="team:search, old:")))
    other = job_of(one.post("/jobs/new", form(one, data, budget="6")))
    made = world.get(job)
    assert (made["name"], made["labels"]) == ("lr 3e-4", {"team": "search", "old": ""})
    assert "lr 3e-4" in one.get(f"/jobs/{job}").text
    for query in ({"name": "3E-4"}, {"label": "team:search"}, {"status": "queued", "name": "lr"}):
        for path in ("/jobs", "/jobs/rows"):
            shown = one.get(path, params=query).text
            assert job in shown
            assert other not in shown
    assert job not in one.get("/jobs", params={"label": "team:other"}).text
    assert one.get("/jobs", params={"name": "\0"}).status_code == 422
    wrong = one.post("/jobs/new", form(one, data, labels="no key!:x"))
    assert wrong.status_code == 422
    assert 'id="wrong-labels"' in wrong.text


def test_a_queued_job_says_when_it_may_start(world: World, data: tuple[str, str]) -> None:
    one = visitor(world)
    job = job_of(one.post("/jobs/new", form(one, data)))
    place = world.get(f"{job}/queue")
    shown = one.get(f"/jobs/{job}").text
    assert place["no_estimate"] == "no_worker"
    assert "No live worker can do it" in shown


def test_another_tenants_pages_are_as_unknown_ones(world: World, data: tuple[str, str]) -> None:
    one, other = visitor(world), visitor(world, world.other_key)
    job = job_of(one.post("/jobs/new", form(one, data)))

    def shown(path: str) -> tuple[int, str]:
        answer = other.get(path)
        return answer.status_code, re.sub(r"(req|job|ds)_[0-9a-f]+", "", answer.text)

    unknown = zip(pages_of(job, data[0]), pages_of(new_id("job"), new_id("ds")), strict=True)
    for theirs, nobodys in unknown:
        if not theirs.endswith("/events"):  # which goes on
            assert one.get(theirs).status_code == 200
        assert shown(theirs) == shown(nobodys)
        assert shown(theirs)[0] == 404
    for path in ("cancel", "retry", "delete"):
        assert other.send(f"/jobs/{job}/{path}").status_code == 404
    assert world.get(job)["status"] == "queued"
    for path in ("/jobs", "/datasets", "/jobs/new"):
        assert job not in other.get(path).text
        assert data[0] not in other.get(path).text


def test_a_key_sees_and_does_what_its_scopes_allow(app: Any, data: tuple[str, str], world: World) -> None:
    made = world.call("POST", "/v1/keys", json={"name": "reader", "scopes": ["read"]}).json()
    reader, one = visitor(world, made["key"]), visitor(world)
    job = job_of(one.post("/jobs/new", form(one, data)))
    assert "/cancel" not in reader.get(f"/jobs/{job}").text
    assert reader.get("/jobs/new").status_code == 403
    assert reader.send(f"/jobs/{job}/cancel").status_code == 403
    assert world.get(job)["status"] == "queued"


def test_an_open_page_asks_again_only_for_what_has_changed(world: World, data: tuple[str, str]) -> None:
    one = visitor(world)
    job = job_of(one.post("/jobs/new", form(one, data)))
    for path in (f"/jobs/{job}/live", "/jobs/rows"):
        tag = one.get(path).headers["etag"]
        assert one.get(path, headers={"if-none-match": tag}).status_code == 304
        assert "x-final" not in one.get(path).headers
    world.cancel(job)
    answer = one.get(f"/jobs/{job}/live", headers={"if-none-match": tag})
    assert (answer.status_code, answer.headers["x-final"]) == (200, "true")


def test_hostile_texts_are_texts(world: World, tmp_path: Any) -> None:
    one = visitor(world)
    rows = [{"id": "<b>id</b>", "source": "<i>source</i>", "prompt": HOSTILE, "completion": "\u202e" + HOSTILE}]
    dataset = world.upload(rows, "<u>name</u>")
    content = write_pool(world.store, tmp_path / "content", [("0", "s", {"text": "t"})])
    job = add_job(world.sessions, world.key, content, JobStatus.FAILED)
    with world.sessions.begin() as session:
        add_event(session, job, "unit.failed", error={"detail": HOSTILE, "<b>": "\u202e"})
    filled = {"model": HOSTILE, "pool": HOSTILE, "target": HOSTILE, "budget": HOSTILE, "kernel.kind": HOSTILE}
    pages = [
        *(one.get(path).text for path in (f"/datasets/{dataset}", "/datasets", "/jobs/new", f"/jobs/{job}/log")),
        one.get(f"/jobs/{job}").text,
        one.get("/jobs", params={"status": HOSTILE}).text,
        one.get("/jobs/new", params=filled).text,
        one.send("/jobs/new", {**filled, "do": "post", "modules": HOSTILE}).text,
        one.send("/jobs/new/plan", filled).text,
        one.get(f"/nowhere/{HOSTILE}").text,
    ]
    for page in pages:
        found = re.findall(r"<(script|img|b|i|u)\b(?! src=\"/static/)[^>]*", page)
        assert found == []
        assert "49 &" not in page
    assert pages[0].count("&lt;script&gt;") == 2


def test_a_megabyte_is_shown_in_part_and_whole_where_it_is_asked_for(world: World) -> None:
    one = visitor(world)
    long = "x" * 900_000
    dataset = world.upload([{"prompt": "p", "completion": long}])
    page = one.get(f"/datasets/{dataset}")
    assert len(page.content) < 100_000
    assert "900,000" in page.text
    address = re.search(r'href="(/datasets/[^"]+whole=true)"', page.text)
    assert address is not None
    assert long in one.get(address[1].replace("&amp;", "&")).text
