"""A result in the store is taken for done only where all that it names is there; what is reused counts as used now."""

import os
from pathlib import Path

import pytest

from service.ids import new_id
from service.plan.artifact_keys import content_key, result_key
from service.storage.artifacts import ArtifactStore, named_keys
from worker.artifact_cache import known_result, mark_used, record_result

UNIT = content_key("influence", {"unit": 1}, ".npy")
TOKENS = content_key("tokens", {"rows": 1}, ".parquet")
STATE = f"{content_key('checkpoints', {}, '')}.optimizer.safetensors"
RESULT = {"shortlist": {"tokens": TOKENS, "count": 3}, "states": [STATE], "notes": ["a/b"], "fidelity": None}


@pytest.fixture(params=["folder", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store") if request.param == "folder" else f"memory://{new_id('store')}")


def put(store: ArtifactStore, key: str, content: bytes = b"x") -> None:
    with store.writing(key) as path:
        path.write_bytes(content)


def test_the_names_within_a_result_are_found_wherever_they_are() -> None:
    assert named_keys(RESULT) == {TOKENS, STATE}
    assert named_keys({"operations": 1.5, "notes": ["landmarks/2"], "sha": "ab" * 32}) == set()


def test_a_result_is_known_while_all_that_it_names_is_there_as_it_was_made(store: ArtifactStore) -> None:
    assert known_result(store, UNIT) is None
    for key in (UNIT, TOKENS, STATE):
        put(store, key)
    recorded = record_result(store, UNIT, RESULT)
    assert {file["key"]: file["size"] for file in recorded["files"]} == {UNIT: 1, TOKENS: 1, STATE: 1}
    assert known_result(store, UNIT) == recorded
    for key in (UNIT, TOKENS):
        store.delete(key)
        assert known_result(store, UNIT) is None
        put(store, key, b"y")
        assert known_result(store, UNIT) is None, "it is another"
        put(store, key)
        assert known_result(store, UNIT) == recorded


def test_a_result_that_was_cut_short_is_unknown_and_set_aside(store: ArtifactStore) -> None:
    put(store, UNIT)
    record_result(store, UNIT, {})
    path = f"{store.root}/{result_key(UNIT)}"
    store.fs.pipe_file(path, store.fs.cat_file(path)[:9])
    assert known_result(store, UNIT) is None
    assert not store.exists(result_key(UNIT))
    assert [file.size for file in store.set_aside()] == [9]


def test_what_is_reused_counts_as_used_now(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    other = content_key("tokens", {"rows": 2}, ".parquet")
    for key in (UNIT, result_key(UNIT), TOKENS, other):
        put(store, key)
        os.utime(tmp_path / key, (1000, 1000))
    mark_used(store, UNIT, RESULT)  # STATE is not there, which is for its reader to say
    assert store.modified(other) == 1000
    assert min(store.modified(key) for key in (UNIT, result_key(UNIT), TOKENS)) > 1000


def test_a_remote_store_is_not_asked_to_remember_a_use() -> None:
    store = ArtifactStore(f"memory://{new_id('store')}")
    put(store, UNIT)
    written = store.modified(UNIT)
    mark_used(store, UNIT, {})
    assert store.modified(UNIT) == written
