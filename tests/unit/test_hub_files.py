"""Which files of a hub repository are a split, told from names and the card alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from worker.errors import ImportFailed
from worker.tasks.hub_files import Split, find_split, readable


def card(folder: Path, *configs: Any, **front: Any) -> None:
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': list(configs), **front})}\n---\n")


def code_of(folder: Path, paths: list[str], config: str | None = None, split: str | None = None) -> str:
    with pytest.raises(ImportFailed) as caught:
        find_split(folder, paths, config, split)
    assert str(folder) not in caught.value.detail
    return str(caught.value.as_dict()["code"])


def test_only_files_that_can_be_read_are_taken_and_none_that_leads_elsewhere() -> None:
    good = ["a.jsonl", "b/c.parquet", "d.CSV", "e.json.gz", "f.jsonl.zst", "g.arrow", "h.txt", "i.tsv"]
    bad = [
        "a.py",
        "b.zip",
        "c.tar.gz",
        "d.pkl",
        "e.bz2",
        "/etc/a.json",
        "../b.json",
        "a/../../c.json",
        "~/d.json",
        "x\\e.json",
    ]
    assert readable(good + bad) == good
    with pytest.raises(ImportFailed, match=r"\.pkl, \.py"):
        readable(["a.py", "b.pkl", "README.md"])


def test_splits_are_told_by_names_of_files_and_folders(tmp_path: Path) -> None:
    paths = [
        "data/train-00001-of-00002.parquet",
        "data/train-00000-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
    ]
    assert find_split(tmp_path, paths, None, "train") == Split("default", "train", [paths[1], paths[0]])
    assert find_split(tmp_path, paths, None, "test").files == [paths[2]]


def test_files_without_a_split_are_train(tmp_path: Path) -> None:
    assert find_split(tmp_path, ["some.jsonl"], None, None) == Split("default", "train", ["some.jsonl"])


def test_configs_of_the_card_are_told_apart(tmp_path: Path) -> None:
    card(
        tmp_path,
        {"config_name": "a", "data_files": "a/*.jsonl", "default": True},
        {"config_name": "b", "data_files": [{"split": "x", "path": ["b/1.jsonl", "b/2.jsonl"]}]},
    )
    paths = ["a/1.jsonl", "b/1.jsonl", "b/2.jsonl"]
    assert find_split(tmp_path, paths, None, None) == Split("a", "train", ["a/1.jsonl"])
    assert find_split(tmp_path, paths, "b", None) == Split("b", "x", ["b/1.jsonl", "b/2.jsonl"])
    assert code_of(tmp_path, paths, "c") == "config_not_found"
    assert code_of(tmp_path, paths, "b", "train") == "split_not_found"


def test_what_a_card_may_set_is_limited(tmp_path: Path) -> None:
    for folder, config in (
        ("url", {"data_files": "https://example.com/*.jsonl"}),
        ("chain", {"data_files": [{"split": "train", "path": "zip://*.jsonl::https://example.com/a.zip"}]}),
        ("above", {"data_files": {"train": ["../a.jsonl"]}}),
        ("root", {"data_files": "/etc/*.json"}),
        ("folder", {"data_dir": "../elsewhere"}),
        ("names", {"data_files": "*.jsonl", "column_names": ["a"]}),
        ("absent", {"data_files": "no/*.jsonl"}),
    ):
        (tmp_path / folder).mkdir()
        card(tmp_path / folder, {"config_name": "x", **config})
        assert code_of(tmp_path / folder, ["a.jsonl"]) == "dataset_not_usable", folder


def test_a_card_that_is_no_yaml_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nconfigs: [unclosed\n---\n")
    assert code_of(tmp_path, ["a.jsonl"]) == "dataset_not_usable"
    (tmp_path / "README.md").write_text("no front matter")
    assert find_split(tmp_path, ["a.jsonl"], None, None).files == ["a.jsonl"]
