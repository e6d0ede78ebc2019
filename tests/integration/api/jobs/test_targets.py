"""The list of the ready-made targets."""

import json

from support.world import World

from service.datasets.presets import PRESETS
from service.datasets.rows.template import RowTemplate


def test_all_are_listed_each_with_what_an_import_of_ones_own_would_need(api: World) -> None:
    found = api.client.get("/v1/targets").json()
    assert [each["name"] for each in found["data"]] == ["gsm8k", "squad", "mmlu", "bbh", "tydiqa", "codex"]
    assert (found["has_more"], found["last_id"]) == (False, "codex")
    for each in found["data"]:
        assert each == PRESETS[each["name"]].model_dump(mode="json")
        assert {"id", "config", "split"} == each["hub"].keys()
        RowTemplate.parse(json.dumps(each["template"]))


def test_only_a_key_may_look(api: World) -> None:
    assert api.client.get("/v1/targets", headers={"Authorization": "Bearer none"}).status_code == 401
