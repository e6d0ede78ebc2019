"""Names and labels: given, shown, searched and changed, and no part of what is computed."""

from typing import Any

import pytest
from sqlalchemy import text
from support.job_requests import URL, post, posted, problem, set_status, upload
from support.world import World

from service.ids import new_id

NAMED = {"name": "Größe 模型 שלום 👩‍💻", "labels": {"team": "search", "example.org/sweep": "lr-3", "empty": ""}}


def found(api: World, **params: Any) -> list[str]:
    page = api.client.get(URL, params=params)
    assert page.status_code == 200, page.text
    return [job["id"] for job in page.json()["data"]]


def change(api: World, job_id: str, **changes: Any) -> Any:
    return api.client.patch(f"{URL}/{job_id}", json=changes)


def entries(api: World, job_id: str) -> list[dict[str, Any]]:
    """The details of the audit log on the job's changes."""
    with api.engine.connect() as connection:
        wanted = text(
            "SELECT detail FROM audit_log WHERE object_id = :id AND action = 'selection_job.changed' ORDER BY id"
        )
        return list(connection.scalars(wanted, {"id": job_id}))


def test_a_job_is_called_what_its_post_says_and_computes_what_it_would_without(
    api: World, body: dict[str, Any]
) -> None:
    job, plain = posted(api.client, body, **NAMED), posted(api.client, body)
    assert (plain["name"], plain["labels"]) == (None, {})
    for shown in (job, api.client.get(f"{URL}/{job['id']}").json(), api.client.get(f"{URL}/{job['id']}?wait=0").json()):
        assert {name: shown[name] for name in NAMED} == NAMED
    with api.engine.connect() as connection:
        rows = connection.execute(
            text("""
                SELECT j.model, j.parameters, j.request, u.artifact_key, u.spec, e.data FROM selection_jobs j
                JOIN job_units u ON u.job_id = j.id JOIN job_events e ON e.job_id = j.id AND e.type = 'job.planned'
                WHERE j.id IN (:one, :two)
            """),
            {"one": job["id"], "two": plain["id"]},
        ).all()
    assert len(rows) == 2
    assert (rows[0].model, rows[0].parameters, rows[0].request) == (rows[1].model, rows[1].parameters, rows[1].request)
    assert rows[0].data == rows[1].data


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("name", value) for value in ("", "x" * 201, "two\nlines", "nul\0", 1, [])),
        *(
            ("labels", value)
            for value in (
                {str(i): "x" for i in range(17)},
                *(
                    {key: "x"}
                    for key in ("", "k" * 64, "-k", "k-", "a b", "a:b", "ä", "/k", "A/k", "a/b/c", "a/", "nul\0")
                ),
                *({"k": value} for value in ("x" * 64, "-x", "x-", "a b", "a:b", "ä", None, 1, {}, "nul\0", "x\n")),
                [],
                None,
            )
        ),
    ],
)
def test_what_no_name_or_label_can_be_is_refused(api: World, body: dict[str, Any], param: str, value: Any) -> None:
    refused = problem(post(api.client, body, **{param: value}), 422, "invalid_request")
    assert refused["param"].split(".")[0] == param
    if not (param == "labels" and value in ({"k": None}, {str(i): "x" for i in range(17)})):  # which a change may have
        job_id = posted(api.client, body)["id"]
        refused = problem(change(api, job_id, **{param: value}), 422, "invalid_request")
        assert refused["param"].split(".")[0] == param
        assert entries(api, job_id) == []


def test_names_and_labels_at_their_bounds_are_taken(api: World, body: dict[str, Any]) -> None:
    labels = {f"{'a' * 128}/{i:02}{'k' * 61}": "v" * 63 for i in range(16)}
    job = posted(api.client, body, name="é" * 200, labels=labels)
    assert (job["name"], job["labels"]) == ("é" * 200, labels)
    assert found(api, name="É" * 200, label=[f"{key}:{value}" for key, value in labels.items()]) == [job["id"]]


def test_a_change_sets_what_it_names_once_and_leaves_the_rest(api: World, body: dict[str, Any]) -> None:
    job_id = posted(api.client, body, name="first", labels={"a": "1", "b": "2"}, metadata={"run": "7"})["id"]
    set_status(api, job_id, "running", "succeeded")
    before = api.client.get(f"{URL}/{job_id}")
    assert change(api, job_id).json() == before.json()
    wanted = {"name": "second", "labels": {"a": None, "b": "3", "c": "", "absent": None}}
    answers = [change(api, job_id, **wanted) for _ in range(2)]
    expected = {**before.json(), "name": "second", "labels": {"b": "3", "c": ""}}
    assert [answer.json() for answer in answers] == [expected] * 2
    assert change(api, job_id, labels={"c": None}).json() == {**expected, "labels": {"b": "3"}}
    assert change(api, job_id, name=None).json() == {**expected, "name": None, "labels": {"b": "3"}}
    after = api.client.get(f"{URL}/{job_id}", headers={"if-none-match": before.headers["etag"]})
    assert (after.status_code, after.json()["name"]) == (200, None)
    assert entries(api, job_id) == [
        {"name": "second", "labels": {"a": None, "b": "3", "c": ""}},
        {"labels": {"c": None}},
        {"name": None},
    ]


def test_a_change_cannot_add_labels_without_end(api: World, body: dict[str, Any]) -> None:
    job_id = posted(api.client, body, labels={f"a{i}": "x" for i in range(9)})["id"]
    refused = problem(change(api, job_id, labels={f"b{i}": "x" for i in range(8)}), 422, "invalid_request")
    assert refused["param"] == "labels"
    assert entries(api, job_id) == []
    gone = {f"a{i}": None for i in range(9)}
    assert len(change(api, job_id, labels={**gone, **{f"b{i}": "x" for i in range(16)}}).json()["labels"]) == 16


def test_what_is_gone_or_anothers_cannot_be_changed_and_a_deleted_job_keeps_no_name(
    api: World, body: dict[str, Any]
) -> None:
    job_id = posted(api.client, body, **NAMED)["id"]
    assert api.other.patch(f"{URL}/{job_id}", json={"name": "mine"}).status_code == 404
    set_status(api, job_id, "cancelled")
    assert api.client.delete(f"{URL}/{job_id}").is_success
    assert change(api, job_id, name="late").status_code == 404
    assert change(api, new_id("job"), name="late").status_code == 404
    with api.engine.connect() as connection:
        kept = text("SELECT name, folded_name, terms, labels FROM selection_jobs WHERE id = :id")
        assert tuple(connection.execute(kept, {"id": job_id}).one()) == (None, None, None, {})


def test_a_list_is_cut_to_names_and_labels(api: World, body: dict[str, Any]) -> None:
    names = ["Straße 100%", "STRASSE 100 %", "a_b", "a_ _b axb", "模型", "ﬁne-tuning", "1~2", None]
    ids = {name: posted(api.client, body, name=name)["id"] for name in names}
    theirs = {**body, "pool": upload(api.other), "target": upload(api.other)}
    posted(api.other, theirs, name="straße", labels={"team": "a"})
    for asked, expected in {
        "strasse": ["STRASSE 100 %", "Straße 100%"],
        "Straße 100%": ["Straße 100%"],
        "%": ["STRASSE 100 %", "Straße 100%"],
        "a_b": ["a_b"],
        "型": ["模型"],
        "FINE": ["ﬁne-tuning"],
        "~": ["1~2"],
        "12": [],
        "ab": [],
    }.items():
        assert found(api, name=asked) == [ids[name] for name in expected], asked
    a, ab, b = (
        posted(api.client, body, labels=labels)["id"] for labels in ({"t": "a"}, {"t": "a", "u": "b"}, {"u": "b"})
    )
    assert found(api, label="t:a") == [ab, a]
    assert found(api, label=["t:a", "u:b"]) == [ab]
    assert (found(api, label="t:"), found(api, label=["t:a", "t:b"]), found(api, label="u:b", name="strasse")) == (
        [],
        [],
        [],
    )
    page = api.client.get(URL, params={"label": "t:a", "limit": 1}).json()
    assert (page["has_more"], found(api, label="t:a", after=page["last_id"])) == (True, [a])
    set_status(api, a, "cancelled")
    assert (found(api, label="t:a", status="queued"), found(api, label="u:b", status="queued")) == ([ab], [b, ab])
    change(api, ids["a_b"], name="other", labels={"t": "a"}).raise_for_status()
    assert (found(api, name="a_b"), found(api, name="OTHER", label="t:a")) == ([], [ids["a_b"]])


@pytest.mark.parametrize(
    ("param", "value"),
    [("name", ""), ("name", "x" * 201), ("name", "\0"), ("label", "team"), ("label", ":x"), ("label", "a:b:c")],
)
def test_a_filter_that_can_find_nothing_is_refused(api: World, param: str, value: str) -> None:
    refused = problem(api.client.get(URL, params={param: value}), 422, "invalid_request")
    assert refused["param"].split(".")[0] == param
