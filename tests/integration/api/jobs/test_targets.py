"""The ready-made targets: the list of them, and jobs that name one."""

import json
from typing import Any

import pytest
from support.job_requests import no_job_was_made, post, problem
from support.world import World

from service.datasets.presets import PRESETS
from service.datasets.rows.template import RowTemplate


def test_all_are_listed_each_with_what_an_import_of_ones_own_would_need(api: World) -> None:
    found = api.client.get("/v1/targets").json()
    assert [each["name"] for each in found["data"]] == ["gsm8k", "squad", "mmlu", "bbh", "tydiqa", "codex"]
    assert (found["has_more"], found["last_id"]) == (False, "codex")
    for each in found["data"]:
        assert each == {**PRESETS[each["name"]].model_dump(mode="json"), "allowed": False}  # by this server's settings
        assert {"id", "config", "split"} == each["hub"].keys()
        RowTemplate.parse(json.dumps(each["template"]))


def test_only_a_key_may_look(api: World) -> None:
    assert api.client.get("/v1/targets", headers={"Authorization": "Bearer none"}).status_code == 401


@pytest.mark.parametrize(
    ("target", "param"),
    [
        ({"preset": "gsm9k"}, "target.preset"),
        ({"preset": ["gsm8k"]}, "target.preset"),
        ({"count": 4}, "target.preset"),
        ({}, "target.preset"),
        ({"preset": "gsm8k", "count": 0}, "target.count"),
        ({"preset": "gsm8k", "count": "48"}, "target.count"),
        ({"preset": "gsm8k", "count": 48.5}, "target.count"),
        ({"preset": "gsm8k", "count": True}, "target.count"),
        ({"preset": "gsm8k", "count": 1_001}, "target.count"),
        ({"preset": "codex", "count": 91}, "target.count"),
        ({"preset": "gsm8k", "seed": -1}, "target.seed"),
        ({"preset": "gsm8k", "seed": 2**32}, "target.seed"),
        ({"preset": "gsm8k", "revision": ""}, "target.revision"),
        ({"preset": "gsm8k", "split": "test"}, "target.split"),
        (["gsm8k"], "target"),
        (None, "target"),
        (7, "target"),
    ],
)
def test_what_is_no_target_is_refused_by_its_name(api: World, body: dict[str, Any], target: Any, param: str) -> None:
    found = problem(post(api.client, body, target=target), 422, "invalid_request")
    assert found["param"] == param
    assert no_job_was_made(api)
