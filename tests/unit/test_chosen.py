"""What is read of a selection, on planted repeats: which samples say the same, and which are the target's own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.datasets import storage
from service.datasets.convert import convert
from service.datasets.rows.options import RowOptions
from service.settings import UploadSettings
from service.storage.artifacts import ArtifactStore
from worker import chosen


def says(name: str, *contents: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"id": name, "messages": messages, **more}


POOL = [
    says("original", "What is 2 + 2?", "It is 4.", source="sums"),
    says("copy", "What is 2 + 2?", "It is 4.", source="sums"),
    says("spaced", " What is  2 + 2?\n", "It\tis 4.", source="sums"),
    says("changed", "What is 2 + 2?", "It is five.", source="sums"),
    says("longer", "What is 2 + 2?", "It is 4.", "Sure?", "Yes.", source="sums"),
    says("asked", "Name a colour.", "Blue.", source="words"),
    {"id": "text", "text": "Name a colour."},
    {"id": "same text", "text": "Name  a colour. "},
]
TARGET = [says("t0", "Name a  colour.", "Blue."), says("t1", "Name a colour.", "Red.")]
PLACE = {row["id"]: index for index, row in enumerate(POOL)}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def published(store: ArtifactStore, rows: list[dict[str, Any]], folder: Path) -> str:
    (folder / "upload").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "upload").open("rb") as file:
        content = convert(file, RowOptions(), UploadSettings(), folder)
    storage.publish(store, content)
    return content.fingerprint


def read(store: ArtifactStore, folder: Path, *ids: str) -> dict[str, Any]:
    pool, target = (published(store, rows, folder) for rows in (POOL, TARGET))
    return chosen.read(store, pool, target, np.array([PLACE[name] for name in ids]), ids)


def test_what_says_the_same_as_one_before_is_named_whatever_its_white_space(
    store: ArtifactStore, tmp_path: Path
) -> None:
    found = read(store, tmp_path, "spaced", "changed", "original", "longer", "copy", "text", "same text")
    assert found["repeats"]["duplicates"] == {
        "count": 3,
        "first": [
            {"id": "original", "same_as": "spaced"},
            {"id": "copy", "same_as": "spaced"},
            {"id": "same text", "same_as": "text"},
        ],
    }
    assert found["repeats"]["overlap"] == {"count": 0, "first": []}
    assert found["conversations"] == 5


def test_samples_of_the_target_are_named(store: ArtifactStore, tmp_path: Path) -> None:
    found = read(store, tmp_path, "original", "asked", "text")
    assert found["repeats"]["overlap"] == {"count": 1, "first": [{"id": "asked", "same_as": "t0"}]}
    assert found["repeats"]["duplicates"]["count"] == 0


def test_a_hundred_are_named_and_all_are_counted(store: ArtifactStore, tmp_path: Path) -> None:
    rows = [says(f"r{i}", "Same?", "Same.") for i in range(130)]
    pool, target = published(store, rows, tmp_path), published(store, TARGET, tmp_path)
    duplicates = chosen.read(store, pool, target, np.arange(130), [row["id"] for row in rows])["repeats"]["duplicates"]
    assert (duplicates["count"], len(duplicates["first"])) == (129, 100)


def test_more_samples_than_are_read_at_once(store: ArtifactStore, tmp_path: Path) -> None:
    n = 2 * chosen._READ_AT_ONCE + 3
    pool = published(store, [{"id": f"r{i}", "text": f"t{i % (n - 1)}"} for i in range(n)], tmp_path)
    target, selected = published(store, TARGET, tmp_path), np.random.default_rng(0).permutation(n)
    found = chosen.read(store, pool, target, selected, [f"r{i}" for i in selected])
    same = {"r0", f"r{n - 1}"}
    ((each),) = found["repeats"]["duplicates"]["first"]
    assert {each["id"], each["same_as"]} == same


def test_names_are_in_rank_order_and_sources_are_counted(store: ArtifactStore, tmp_path: Path) -> None:
    pool = published(store, POOL, tmp_path)
    ids, sources = chosen.names(store, pool, np.array([6, 5, 0, 3]))
    assert (ids, sources) == (["text", "asked", "original", "changed"], [None, "words", "sums", "sums"])
    counted = chosen.by_source(sources, np.array([1.0, 0.5, 2.0, 0.25]), {"sums": 5, "words": 1, "(none)": 2})
    assert list(counted.items()) == [
        ("sums", {"pool": 5, "selected": 2, "weight": 2.25}),
        ("(none)", {"pool": 2, "selected": 1, "weight": 1.0}),
        ("words", {"pool": 1, "selected": 1, "weight": 0.5}),
    ]
