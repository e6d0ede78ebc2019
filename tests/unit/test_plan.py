"""How a job is cut into units, and what the names of their artifacts depend on."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.jobs.schemas import Parameters
from service.jobs.state import Stage
from worker.stages import plan
from worker.stages.plan import JobInputs
from worker.stages.prepare import choose_landmarks

token_counts = st.lists(st.integers(0, 5_000), min_size=1, max_size=600).map(lambda counts: np.array(counts, np.int64))


class TestShards:
    @given(tokens=token_counts, size=st.integers(1, 20_000))
    def test_they_cover_every_sample_once_in_order(self, tokens: np.ndarray, size: int) -> None:
        shards = plan.shards(tokens, size)
        assert [row for a, b in shards for row in range(a, b)] == list(range(len(tokens)))
        assert all(a < b for a, b in shards)
        assert len(shards) <= 256

    @given(tokens=token_counts, size=st.integers(1, 20_000))
    def test_they_are_of_about_equal_tokens(self, tokens: np.ndarray, size: int) -> None:
        """None holds more than its share and one sample, which cannot be cut."""
        shards = plan.shards(tokens, size)
        share = max(size, -(-int(tokens.sum()) // 256), -(-int(tokens.sum()) // len(tokens)))
        assert max(int(tokens[a:b].sum()) for a, b in shards) <= share + int(tokens.max()) + 1

    def test_few_tokens_make_one_shard(self) -> None:
        assert plan.shards(np.array([5, 0, 7]), 100) == [(0, 3)]

    def test_samples_without_tokens_are_covered(self) -> None:
        assert plan.shards(np.zeros(4, np.int64), 100) == [(0, 4)]


@given(usable=st.sets(st.integers(0, 300), min_size=2), count=st.integers(2, 320), seed=st.integers(0, 2**63 - 1))
def test_landmarks_are_usable_distinct_and_rising(usable: set[int], count: int, seed: int) -> None:
    candidates = np.array(sorted(usable))
    landmarks = choose_landmarks(candidates, count, seed)
    assert len(landmarks) == min(count, len(usable))
    assert (np.diff(landmarks) > 0).all()
    assert set(landmarks.tolist()) <= usable
    assert landmarks.tolist() == choose_landmarks(candidates, count, seed).tolist()


PREPARED: dict[str, Any] = {
    "model_fingerprint": "m",
    "dtype": "float32",
    "pool_tokens": "tokens/pool",
    "target_tokens": "tokens/target",
    "landmarks": "landmarks/l",
    "embed_shards": [[0, 60], [60, 100]],
    "landmark_shards": [[0, 20]],
    "target_shards": [[0, 5]],
    "n": 100,
    "t": 5,
}


def job(**changes: Any) -> JobInputs:
    """`changes` go to parameters by their path: embedding__blocks=2."""
    parameters = Parameters().model_dump(mode="json")
    inputs = {"model": {"kind": "registered", "name": "m"}, "pool": "p", "target": "t", "budget": 10}
    for name, value in changes.items():
        *path, last = name.split("__")
        into = inputs if name in inputs else parameters
        for part in path:
            into = into[part]
        into[last] = value
    return JobInputs(**inputs, parameters=parameters)


def keys(inputs: JobInputs, **prepared: Any) -> dict[Stage, list[str]]:
    """The artifact of every unit, by stage."""
    known = {**copy.deepcopy(PREPARED), **prepared}
    found: dict[Stage, list[str]] = {}
    for unit in plan.compute_units(inputs, known):
        found.setdefault(unit.stage, []).append(unit.artifact_key)
    found[Stage.PROPAGATE] = [u.artifact_key for u in plan.propagate_units(inputs, known, dict(found))]
    found[Stage.SELECT] = [u.artifact_key for u in plan.select_units(inputs, known, found[Stage.PROPAGATE][0])]
    return found


EMBED, LANDMARKS, TARGETS = Stage.EMBED, Stage.LANDMARK_GRADIENTS, Stage.TARGET_GRADIENTS
AFTER = {Stage.PROPAGATE, Stage.SELECT}
GRADIENTS = {LANDMARKS, TARGETS}


class TestArtifactKeys:
    @pytest.mark.parametrize(
        ("changes", "prepared", "expected"),
        [
            ({}, {}, set()),
            ({}, {"model_fingerprint": "other"}, {EMBED, *GRADIENTS, *AFTER}),
            ({}, {"dtype": "bfloat16"}, {EMBED, *GRADIENTS, *AFTER}),
            ({"seed": 1}, {}, {EMBED, *GRADIENTS, *AFTER}),
            ({}, {"pool_tokens": "tokens/other"}, {EMBED, *AFTER}),
            ({}, {"landmarks": "landmarks/other"}, {LANDMARKS, *AFTER}),
            ({"target": "other"}, {"target_tokens": "tokens/other"}, {TARGETS, *AFTER}),
            ({"embedding__kind": "hidden"}, {}, {EMBED, *AFTER}),
            ({"embedding__pooling": "last"}, {}, {EMBED, *AFTER}),
            ({"embedding__blocks": 2}, {}, {EMBED, *AFTER}),
            ({"embedding__tangents": 3}, {}, {EMBED, *AFTER}),
            ({"gradient__projection_dim": 1024}, {}, {*GRADIENTS, *AFTER}),
            ({"gradient__normalize": False}, {}, AFTER),
            ({"kernel__kind": "linear"}, {}, AFTER),
            ({"kernel__ridge": 0.1}, {}, AFTER),
            ({"kernel__bandwidth": 2.0}, {}, AFTER),
            ({"budget": 11}, {}, {Stage.SELECT}),
            ({"selection": "top_k"}, {}, {Stage.SELECT}),
            # A model under another name, or asked for by another dtype's name, is the same where its files and dtype are.
            ({"model": {"kind": "registered", "name": "copy"}}, {}, set()),
            ({"dtype": "float32"}, {}, set()),
        ],
    )
    def test_they_change_with_what_they_depend_on_alone(
        self, changes: dict[str, Any], prepared: dict[str, Any], expected: set[Stage]
    ) -> None:
        before, after = keys(job()), keys(job(**changes), **prepared)
        assert {stage for stage in before if before[stage] != after[stage]} == expected

    def test_a_shard_keeps_its_name_where_its_rows_stay(self) -> None:
        before, after = keys(job()), keys(job(), embed_shards=[[0, 60], [60, 90], [90, 100]])
        assert before[EMBED][0] == after[EMBED][0]
        assert before[EMBED][1] not in after[EMBED]

    def test_no_two_units_share_a_name(self) -> None:
        every = [key for stage_keys in keys(job()).values() for key in stage_keys]
        assert len(every) == len(set(every)) == 6

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("influence/embeddings.py", {EMBED, *GRADIENTS, *AFTER}),
            ("stages/embed.py", {EMBED, *AFTER}),
            ("stages/gradients.py", {*GRADIENTS, *AFTER}),
            ("stages/propagate.py", AFTER),
            ("stages/select.py", {Stage.SELECT}),
            ("supervisor.py", set()),
        ],
    )
    def test_they_change_with_the_code_of_their_stage(
        self, source: str, expected: set[Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = keys(job())
        for file in plan._WORKER.rglob("*.py"):
            copied = tmp_path / file.relative_to(plan._WORKER)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(file.read_bytes())
        with (tmp_path / source).open("a") as changed:
            changed.write("# changed\n")
        monkeypatch.setattr(plan, "_WORKER", tmp_path)
        plan.code_version.cache_clear()
        try:
            after = keys(job())
        finally:
            plan.code_version.cache_clear()
        assert {stage for stage in before if before[stage] != after[stage]} == expected

    def test_tokens_depend_on_data_tokenizer_and_length(self) -> None:
        names = {
            plan.tokens_key(*arguments) for arguments in [("d", "t", 8), ("e", "t", 8), ("d", "u", 8), ("d", "t", 9)]
        }
        assert len(names) == 4
        assert plan.tokens_key("d", "t", 8) == plan.tokens_key("d", "t", 8)

    def test_landmarks_depend_on_pool_count_and_seed(self) -> None:
        names = {plan.landmarks_key(*arguments) for arguments in [("p", 8, 0), ("q", 8, 0), ("p", 9, 0), ("p", 8, 1)]}
        assert len(names) == 4
