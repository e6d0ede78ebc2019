"""Presets of an export over HTTP, and by the client, which writes what the tool needs beside the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.jobs import published, write_pool
from support.results import K, Published

from service.datasets import storage
from service.results.presets import Preset
from winnow.client import Winnow
from winnow.companions import ExportPreset
from winnow.errors import WinnowError

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def lines(answer: Any) -> list[Any]:
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.fixture(scope="module")
def mixed(world: Published, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job that has selected a conversation, then a text before it in the pool."""
    samples = [("x", None, {"text": "t"}), ("y", "s", {"messages": MESSAGES}), ("z", None, {"messages": MESSAGES})]
    content = write_pool(world.store, tmp_path_factory.mktemp("mixed") / "pool", samples)
    selection = {"selected": np.array([1, 0]), "sample_ids": ["y", "x"], "sources": ["s", None]}
    return published(world.sessions, world.key, content, weight=np.array([0.5, 2, 0], np.float32), **selection)


def test_a_preset_is_the_selection_in_the_order_of_the_pool(world: Published) -> None:
    answer = world.fetch("export", preset="rows")
    assert answer.headers["content-disposition"] == f'attachment; filename="{world.job_id}.jsonl"'
    found = lines(answer)
    assert [row["id"] for row in found] == [world.ids[i] for i in sorted(world.selected)]
    assert len(lines(world.fetch("export", preset="trl", format="jsonl"))) == K


def test_rows_are_repeated_by_weight(world: Published, mixed: str) -> None:
    assert [row["id"] for row in lines(world.fetch("export", job_id=mixed, preset="rows", repeat=True))] == [*"xyy"]
    repeated = lines(world.fetch("export", preset="rows", repeat=True))
    assert abs(len(repeated) - world.weight[world.selected].sum(dtype=np.float64)) <= 0.51
    tags = {world.fetch("export", preset="rows", repeat=repeat).headers["etag"] for repeat in (True, False)}
    assert len(tags) == 2


def test_a_sample_that_a_format_cannot_hold_is_named(world: Published, mixed: str) -> None:
    refused = world.fetch("export", job_id=mixed, preset="openai")
    problem = refused.json()
    assert (refused.status_code, problem["code"], problem["param"]) == (422, "preset_unsuitable", "preset")
    assert "sample x (index 0)" in problem["detail"]
    assert [row.get("text") for row in lines(world.fetch("export", job_id=mixed, preset="rows"))] == ["t", None]


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"preset": "rows", "format": "csv"}, "format"),
        ({"preset": "rows", "selected_only": False}, "selected_only"),
        ({"preset": "rows", "include": "messages"}, "include"),
        ({"preset": "rows", "escape_formulas": False}, "escape_formulas"),
        ({"preset": "nanotron"}, "preset"),
        ({"repeat": True}, "repeat"),
    ],
)
def test_an_option_that_does_not_apply_is_refused(world: Published, params: dict[str, Any], param: str) -> None:
    answer = world.fetch("export", **params)
    assert (answer.status_code, answer.json()["param"]) == (422, param)


def test_a_deleted_pool_has_no_preset(world: Published, tmp_path: Path, url: str) -> None:
    content = write_pool(world.store, tmp_path / "pool", [("0", None, {"text": "u"}), ("1", None, {"text": "v"})])
    job_id = published(world.sessions, world.key, content, deleted=True)
    world.store.delete(storage.rows_key(content.fingerprint))
    with Winnow(url, world.key) as winnow:
        for options in ({}, {"preset": "rows"}):
            with pytest.raises(WinnowError) as gone:
                winnow.export(job_id, tmp_path / "out.jsonl", **options)
            assert (gone.value.status, gone.value.code) == (410, "pool_deleted")
        assert not list(tmp_path.glob("*out*"))


def test_the_client_writes_what_the_tool_needs_beside_the_file(world: Published, url: str, tmp_path: Path) -> None:
    assert set(Preset) == set(ExportPreset.__args__)  # type: ignore[attr-defined]
    with Winnow(url, world.key) as winnow:
        results = winnow.results(world.job_id)
        path = results.export(tmp_path / "train.jsonl", preset="axolotl")
        assert len(path.read_text().splitlines()) == K
        results.export(tmp_path / "other.jsonl", preset="llamafactory", repeat=True)
        for name, options in {
            "x.csv": {"preset": "trl"},
            "x.jsonl": {"preset": "trl", "include": None},
            "y.jsonl": {"preset": "trl", "selected_only": False},
        }.items():
            with pytest.raises(ValueError, match="preset"):
                results.export(tmp_path / name, **options)
    assert {file.name for file in tmp_path.iterdir()} == {
        *("train.jsonl", "train.axolotl.yaml", "other.jsonl", "dataset_info.json")
    }
    assert json.loads((tmp_path / "dataset_info.json").read_text())["other"]["file_name"] == "other.jsonl"
