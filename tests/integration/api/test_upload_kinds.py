"""A file of every kind that people have, over HTTP: its rows, what the loss counts, what was taken, and what is refused."""

import json
from typing import TYPE_CHECKING, Any

import pytest
from support.upload_kinds import KINDS, Kind, jsonl, says, with_key

from service.datasets.rows.forms import Form

if TYPE_CHECKING:
    from support.world import World

# What the refusal must name, so that a stranger can act on it.
REFUSED = {
    "preference pairs": (jsonl({"prompt": "a", "chosen": "b", "rejected": "c"}), {}, "completion:chosen"),
    "an image": (
        jsonl(with_key(says("user: ", "assistant: b"), 0, content=[{"type": "image_url", "image_url": {"url": "x"}}])),
        {},
        "image",
    ),
    "no reply": (jsonl(says("user: a", ground_truth="b")), {}, "ground_truth"),
    "a column that is not there": (jsonl({"text": "a", "korpus": "b"}), {"columns": "source:corpus"}, "corpus"),
    "a slot that is not there": (jsonl({"q": "a", "a": "b"}), {"columns": "promt:q,completion:a"}, "promt"),
    "a template that is no template": (jsonl({"q": "a"}), {"template": '{"user": "{{ q"}'}, "user"),
    "a zip": (b"PK\x03\x04" + bytes(60), {}, "zip"),
}


def upload(world: "World", kind: Kind) -> Any:
    return world.client.post("/v1/datasets", params={"name": kind.name, **kind.params}, content=kind.file)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_becomes_what_it_should(api: "World", name: str) -> None:
    kind = KINDS[name]
    answer = upload(api, kind)
    assert answer.status_code == 201, answer.text
    dataset = answer.json()
    assert (dataset["row_count"], dataset["skipped"]) == (len(kind.counts), kind.skipped)
    rows = api.client.get(f"/v1/datasets/{dataset['id']}/rows", params={"limit": 100}).json()["data"]
    counts = [[message["counts"] for message in row["messages"]] if row["messages"] else [True] for row in rows]
    assert counts == kind.counts
    detected = dataset["detected"]
    assert sum(form["rows"] for form in detected["forms"]) == len(rows) + (name == "repeated id")
    most = detected["forms"][0]
    assert most["form"] == kind.form or not kind.form
    assert most["columns"].items() >= kind.columns.items()
    assert set(detected["left_alone"]) == set(kind.left)
    assert [note["code"] for note in detected["notes"]] == kind.notes
    report = api.client.get(f"/v1/datasets/{dataset['id']}/skipped").content.splitlines()
    assert len(report) == kind.skipped


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_with_what_to_do(api: "World", name: str) -> None:
    file, params, part = REFUSED[name]
    answer = upload(api, Kind(file, params=params))
    assert answer.status_code == 422, answer.text
    problem = answer.json()
    assert part in problem["detail"] + json.dumps(problem.get("errors"))
    if "columns" in params:
        assert problem["param"] == "columns"


def test_every_form_has_its_file() -> None:
    forms = {kind.form for kind in KINDS.values()}
    assert forms >= set(Form) - {Form.AUTO}
