"""How datasets are cut, and the units that tokenise them."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from service.plan import shards as cuts
from service.plan.parameters import Parameters
from service.plan.stages import Done, JobInputs, Stage
from service.plan.waves import next_units

PREPARED: dict[str, Any] = {
    "model_fingerprint": "m",
    "is_adapter": False,
    "dtype": "float32",
    "target_tokens": "tokens/target",
    "landmarks": "tokens/landmarks",
    "all_exact": True,
    "landmark_shards": [[0, 12]],
    "target_shards": [[0, 5]],
    "n": 100,
}


def job(**parameters: Any) -> JobInputs:
    values = Parameters(**parameters).model_dump(mode="json")
    return JobInputs(model={"kind": "registered", "name": "m"}, pool="p", target="t", budget=10, parameters=values)


token_counts = st.lists(st.just(0) | st.integers(0, 5_000), min_size=1, max_size=600).map(
    lambda counts: np.array(counts, np.int64)
)


class TestShards:
    @given(tokens=token_counts, size=st.integers(1, 20_000))
    def test_they_cover_every_sample_once_in_order(self, tokens: np.ndarray, size: int) -> None:
        shards = cuts.shards(tokens, size)
        assert [row for a, b in shards for row in range(a, b)] == list(range(len(tokens)))
        assert all(a < b for a, b in shards)
        assert all(tokens[a:b].any() for a, b in shards) or not tokens.any()
        assert len(shards) <= 256

    @given(tokens=token_counts, size=st.integers(1, 20_000))
    def test_they_are_of_about_equal_tokens(self, tokens: np.ndarray, size: int) -> None:
        """None holds more than its share and one sample, which cannot be cut."""
        shards = cuts.shards(tokens, size)
        share = max(size, -(-int(tokens.sum()) // 256), -(-int(tokens.sum()) // len(tokens)))
        assert max(int(tokens[a:b].sum()) for a, b in shards) <= share + int(tokens.max()) + 1

    def test_few_tokens_make_one_shard(self) -> None:
        assert cuts.shards(np.array([5, 0, 7]), 100) == [(0, 3)]

    def test_samples_without_tokens_are_covered(self) -> None:
        assert cuts.shards(np.zeros(4, np.int64), 100) == [(0, 4)]

    @settings(deadline=None)
    @given(
        groups=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40_000_000)), min_size=1, max_size=40),
    )
    def test_those_of_a_dataset_cover_its_rows_and_follow_from_it_alone(self, groups: list[tuple[int, int]]) -> None:
        rows, sizes = ([group[i] for group in groups] for i in (0, 1))
        found = cuts.prepare_shards(rows, sizes)
        assert [row for a, b in found for row in range(a, b)] == list(range(sum(rows)))
        assert found == cuts.prepare_shards(rows, sizes)
        assert len(found) <= 256
        if sum(sizes) <= cuts.PREPARE_SHARD_BYTES:
            assert len(found) == 1


ASKED = {"model_fingerprint": "m", "tokenizer_fingerprint": "t", "max_length": 64, "samples_done": 5}
bounds = st.lists(st.integers(1, 500), min_size=2, max_size=256, unique=True).map(
    lambda ends: list(pairwise([0, *sorted(ends)]))
)


class TestPrepare:
    @settings(deadline=None)
    @given(shards=st.dictionaries(st.sampled_from(["pool", "target"]), bounds, min_size=1))
    def test_a_unit_for_each_shard_and_one_that_puts_them_together(self, shards: dict[str, Any]) -> None:
        inputs, done = job(), [Done(artifact_key="prepare/local", spec={}, result={**ASKED, "shards": shards})]
        units = next_units(inputs, {Stage.PREPARE: done})
        covered = {name: [unit for unit in units if unit.spec["dataset"] == name] for name in shards}
        for name, parts in shards.items():
            assert [(unit.spec["start"], unit.spec["stop"]) for unit in covered[name]] == parts
            assert [unit.total for unit in covered[name]] == [stop - start for start, stop in parts]
            assert {unit.spec["of"] for unit in covered[name]} == {parts[-1][1]}
        assert [unit.shard for unit in units] == list(range(1, len(units) + 1))
        assert len({unit.artifact_key for unit in units}) == len(units) == sum(map(len, shards.values()))
        finished = [Done(artifact_key=unit.artifact_key, spec=unit.spec, result={}) for unit in units]
        (last,) = next_units(inputs, {Stage.PREPARE: [*done, *finished]})
        assert (last.shard, last.stage, last.total) == (len(units) + 1, Stage.PREPARE, 0)
        assert last.artifact_key not in {done[0].artifact_key, *(unit.artifact_key for unit in units)}
        prepared = Done(
            artifact_key=last.artifact_key, spec=last.spec, result={"pool_tokens": "tokens/pool", **PREPARED}
        )
        following = next_units(inputs, {Stage.PREPARE: [*done, *finished, prepared]})
        assert following == next_units(inputs, {Stage.PREPARE: [prepared]}) != []

    def test_shards_are_named_by_what_they_depend_on(self) -> None:
        def keys(inputs: JobInputs, **asked: Any) -> set[str]:
            result = {**ASKED, "shards": {"pool": [[0, 9], [9, 20]]}, **asked}
            first = Done(artifact_key="prepare/local", spec={}, result=result)
            return {unit.artifact_key for unit in next_units(inputs, {Stage.PREPARE: [first]})}

        usual = job()
        before = keys(usual)
        for other in ({"seed": 3}, {"landmarks": {"count": 9}}, {"method": "random"}):
            assert keys(job(**other)) == before
        assert keys(replace(usual, target="other", budget=3), samples_done=9) == before
        for changed_keys in (
            keys(replace(usual, pool="other")),
            keys(replace(usual, salt="job")),
            keys(job(reasoning="strip")),
            keys(usual, tokenizer_fingerprint="other"),
            keys(usual, max_length=65),
            keys(usual, shards={"pool": [[0, 8], [8, 20]]}),
        ):
            assert not changed_keys & before
