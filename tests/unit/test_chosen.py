"""What is read of a selection, on planted repeats: which samples say the same, and which are the target's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.duplicates import context, published, says

from service.storage.artifacts import ArtifactStore
from worker import chosen
from worker.stages.duplicates import PoolRepeats, exclude
from worker.text import token_files
from worker.text.tokenization import Tokenised

TOKENS, COUNTS = "tokens/pool.parquet", "tokens/pool.counts.parquet"


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


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def read(
    store: ArtifactStore,
    folder: Path,
    *ids: str,
    rows: list[dict[str, Any]] = POOL,
    target: list[dict[str, Any]] = TARGET,
    **parameters: str,
) -> dict[str, Any]:
    of = context(store, published(store, rows, folder), published(store, target, folder), **parameters)
    found = PoolRepeats(of, [(0, len(rows))], lambda: None).find()
    samples = (Tokenised(i, np.ones(2, np.int32), np.ones(2, bool), False, False) for i in range(len(rows)))
    token_files.write_part(store, TOKENS, COUNTS, samples)
    prepared = {
        "repeats": {**found.counts, "keys": found.keys},
        "exclusions": exclude(of, COUNTS, np.ones(len(rows), bool), found),
        "pool_tokens": COUNTS,
    }
    place = {row["id"]: index for index, row in enumerate(rows)}
    return chosen.read(store, of.job, prepared, np.array([place[name] for name in ids]), ids)


def test_what_says_the_same_as_one_before_is_named_whatever_its_form(store: ArtifactStore, tmp_path: Path) -> None:
    found = read(store, tmp_path, "spaced", "changed", "original", "longer", "copy", "text", "same text")
    assert found["repeats"]["duplicates"] == {
        "pool": {"exact": 3, "near": 0, "repeated": 2},
        "excluded": 0,
        "count": 3,
        "first": [
            {"id": "original", "same_as": "spaced"},
            {"id": "copy", "same_as": "spaced"},
            {"id": "same text", "same_as": "text"},
        ],
    }
    assert found["repeats"]["overlap"]["count"] == 0
    assert found["excluded"] is None
    assert found["conversations"] == 5


def test_samples_of_the_target_are_named(store: ArtifactStore, tmp_path: Path) -> None:
    found = read(store, tmp_path, "original", "asked", "text")["repeats"]
    assert found["overlap"] == {
        "pool": {"exact": 1, "near": 0, "repeated": 1},
        "excluded": 0,
        "count": 1,
        "first": [{"id": "asked", "same_as": "t0"}],
    }
    assert found["duplicates"]["count"] == 0


def test_what_is_left_out_is_named_with_what_it_repeats(store: ArtifactStore, tmp_path: Path) -> None:
    found = read(store, tmp_path, "original", "changed", duplicates="one", overlap="exclude")
    assert found["excluded"] == {
        "count": 4,
        "by_reason": {"duplicate": 3, "overlap": 1},
        "first": [
            {"index": 1, "id": "copy", "reason": "duplicate", "same_as": "original"},
            {"index": 2, "id": "spaced", "reason": "duplicate", "same_as": "original"},
            {"index": 5, "id": "asked", "reason": "overlap", "same_as": "t0"},
            {"index": 7, "id": "same text", "reason": "duplicate", "same_as": "text"},
        ],
    }
    assert {kind: each["excluded"] for kind, each in found["repeats"].items()} == {"duplicates": 3, "overlap": 1}


def test_a_hundred_are_named_and_all_are_counted(store: ArtifactStore, tmp_path: Path) -> None:
    rows = [says(f"r{i}", "Same?", "Same.") for i in range(130)]
    found = read(store, tmp_path, *(row["id"] for row in rows), rows=rows)["repeats"]["duplicates"]
    assert (found["count"], len(found["first"])) == (129, 100)
    left_out = read(store, tmp_path, "r0", rows=rows, duplicates="one")["excluded"]
    assert (left_out["count"], len(left_out["first"])) == (129, 100)


def test_more_samples_than_are_read_at_once(store: ArtifactStore, tmp_path: Path) -> None:
    n = 2 * chosen._READ_AT_ONCE + 3
    rows = [{"id": f"r{i}", "text": f"t{i % (n - 1)}"} for i in range(n)]
    found = read(store, tmp_path, *(f"r{i}" for i in np.random.default_rng(0).permutation(n)), rows=rows)
    ((each),) = found["repeats"]["duplicates"]["first"]
    assert {each["id"], each["same_as"]} == {"r0", f"r{n - 1}"}
    assert found["conversations"] == 0


def test_what_the_version_before_prepared_says_nothing_of_repeats(store: ArtifactStore, tmp_path: Path) -> None:
    job = context(store, published(store, POOL, tmp_path), "").job
    found = chosen.read(store, job, {}, np.array([0, 6]), ["original", "text"])
    assert found == {"repeats": None, "excluded": None, "conversations": 1}


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
