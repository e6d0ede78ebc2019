"""Explanations of whole jobs against plain torch on the stages' artifacts: contributions add up to the influence shown."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.local_job import Ran, run
from support.tiny import pool_rows, save_model, target_rows, write_jsonl

from service.ledger.tables import JobUnit
from service.plan import shards
from service.plan.stages import Stage
from service.results import explain, neighbours
from service.results.explain import Origin, SampleQuery, Unexplained, explained
from service.results.schemas import Explanation
from service.results.tensor_reader import Tensors, npy_row
from worker import local_run

POOL, TARGET, LANDMARKS = 40, 18, 12
MUTE, MUTE_TARGET = 11, 4  # without a response
# A template without a token that ends a turn: an empty reply has nothing to predict.
BARE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

PLAIN: dict[str, Any] = {"refine": 0}
LINEAR: dict[str, Any] = {"refine": 0, "kernel": {"kind": "linear", "ridge": 0.1}}
CURVED: dict[str, Any] = {
    "refine": 0,
    "selection": "weighted",
    "gradient": {"normalize": False},
    "optimizer": {"type": "sgd", "learning_rate": 1e-3},
    "curvature": {"type": "ggn", "rank": 4},
}
REFINED: dict[str, Any] = {"refine": 0.3}
GROWN: dict[str, Any] = {"landmarks": {"count": 12}, "min_fidelity": 0.9}  # which the random model never reaches
EXACT, COSINE, RANDOM = ({"method": method} for method in ("exact_influence", "rds_plus", "random"))


@dataclass
class Jobs:
    """Jobs on one store; a finished one is remembered."""

    folder: Path
    model: Path
    files: dict[str, Path]
    _finished: dict[str, Ran] = field(default_factory=dict)

    def ran(self, changes: dict[str, Any]) -> Ran:
        name = json.dumps(changes, sort_keys=True)
        if name not in self._finished:
            given = {"budget": 8, "validate": False, **changes}
            self._finished[name] = run(self.model, *self.files.values(), self.folder / "store", **given)
        return self._finished[name]

    def origin(self, changes: dict[str, Any]) -> Origin:
        units = [
            JobUnit(stage=stage, artifact_key=unit.artifact_key, spec=unit.spec, result=unit.result)
            for stage, units in self.ran(changes).done.items()
            for unit in units
        ]
        return Origin(changes.get("method", "influence_distillation"), self.fingerprint("target"), TARGET, units)

    def fingerprint(self, name: str) -> str:
        return local_run._register(self.ran(EXACT).compute.store, self.files[name]).fingerprint

    def explained(self, changes: dict[str, Any], index: int, **asked: Any) -> Explanation:
        ran = self.ran(changes)
        question = {"landmarks": 100, "target": None, "first_target": 0, "targets_limit": 100, **asked}
        return explained(
            ran.compute.store,
            self.origin(changes),
            SampleQuery(index=index, **question),
            self.fingerprint("pool"),
            None if np.isnan(published := float(ran.arrays["influence"][index])) else published,
            bool(ran.arrays["exact"][index]),
        )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("explain")
    rows = {"pool": pool_rows(POOL), "target": target_rows(TARGET, "python_function")}
    for name, mute in (("pool", MUTE), ("target", MUTE_TARGET)):
        rows[name][mute]["messages"][-1]["content"] = ""
    files = {name: write_jsonl(folder / f"{name}.jsonl", each) for name, each in rows.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "EMBED_SHARD_TOKENS", 1_000)  # several shards, and several blocks of landmarks
        patch.setattr(neighbours, "_ROWS", 5)
        patch.setattr(explain, "_READ_AT_ONCE", 4)
        yield Jobs(folder, save_model(folder / "bare", template=BARE), files)


def indices(ran: Ran, *, exact: bool) -> list[int]:
    return [i for i in np.flatnonzero(ran.arrays["exact"] == exact).tolist() if i != MUTE]


def total(explanation: Explanation) -> float:
    assert explanation.average is not None
    assert explanation.correction is not None
    return explanation.average + sum(each.contribution for each in explanation.landmarks) + explanation.correction


class Truth:
    """The propagation of METHOD 2 in plain torch: embeddings from the shards, one solve, no code under test."""

    def __init__(self, jobs: Jobs, changes: dict[str, Any]) -> None:
        ran = jobs.ran(changes)
        store = ran.compute.store
        parts = [load_file(ran.path(Stage.EMBED, i))["embeddings"] for i in range(len(ran.done[Stage.EMBED]))]
        E = torch.cat(parts).double()
        self.rows = torch.tensor(indices(ran, exact=True))
        P = torch.from_numpy(np.load(ran.path(Stage.PROPAGATE, -1)))[:, :TARGET].double()
        result = ran.done[Stage.PROPAGATE][-1].result
        with store.local(result["explanation"]) as path:
            shapes = {name: tuple(tensor.shape) for name, tensor in load_file(path).items()}
        assert shapes["coefficients"] == shapes["influence"] == (1 + TARGET, LANDMARKS)
        distance = torch.cdist(E, E[self.rows], compute_mode="donot_use_mm_for_euclid_dist")
        sigma = result["sigma"] or 1.0
        self.kernel = {
            "linear": E @ E[self.rows].T,
            "rbf": torch.exp(-distance.square() / (2 * sigma**2)),
            "laplacian": torch.exp(-distance / sigma),
        }[result["kernel"]]
        K_ll = self.kernel[self.rows] + result["delta"] * torch.eye(len(self.rows), dtype=torch.float64)
        self.own = P[self.rows]
        self.coefficients = torch.linalg.solve(K_ll, self.own)
        self.counts = [t for t in range(TARGET) if t != MUTE_TARGET]


@pytest.mark.parametrize("changes", [PLAIN, LINEAR, CURVED], ids=["rbf", "linear", "curvature"])
@pytest.mark.parametrize("target", [None, 0, TARGET - 1])
def test_an_influence_is_the_average_the_nearest_and_a_correction(
    jobs: Jobs, changes: dict[str, Any], target: int | None
) -> None:
    ran, truth = jobs.ran(changes), Truth(jobs, changes)
    assert len(truth.rows) == LANDMARKS
    columns = truth.counts if target is None else [target]
    alpha, own = (X[:, columns].mean(dim=1).numpy() for X in (truth.coefficients, truth.own))
    propagated = indices(ran, exact=False)
    for index in (propagated[0], propagated[-1]):
        found = jobs.explained(changes, index, target=target, landmarks=5)
        assert (found.explained_by, found.target) == ("landmarks", target)
        kernel = truth.kernel[index].numpy()
        nearest = np.argsort(-kernel, kind="stable")[:5]
        assert [each.index for each in found.landmarks] == truth.rows[nearest].tolist()
        assert [each.id for each in found.landmarks] == [f"row-{i}" for i in truth.rows[nearest].tolist()]
        similar = kernel[nearest].clip(0)
        weight = similar / similar.sum() if similar.sum() else np.full(5, 0.2)
        scale = np.abs(own).max()
        for name, expected in (
            ("kernel", kernel[nearest]),
            ("influence", own[nearest]),
            ("weight", weight),
            ("contribution", weight * (own[nearest] - own.mean())),
        ):
            given = [getattr(each, name) for each in found.landmarks]
            assert given == pytest.approx(expected, abs=1e-6 * max(scale, np.abs(expected).max())), name
        assert found.average == pytest.approx(own.mean(), abs=1e-6 * scale)
        assert found.influence == pytest.approx(kernel @ alpha, abs=1e-5 * np.abs(kernel * alpha).sum())
        assert total(found) == pytest.approx(found.influence, abs=1e-12)
        assert all(each.excerpt and each.excerpt.startswith("user: ") for each in found.landmarks)
        if target is None:
            assert found.influence == ran.arrays["influence"][index]


def test_where_some_of_the_exact_samples_span_the_fit_it_is_those_that_are_near(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.stages.propagate.MAX_CENTRES", 5)
    changes = {**PLAIN, "seed": 1}
    ran = jobs.ran(changes)
    rows = indices(ran, exact=True)
    found = jobs.explained(changes, indices(ran, exact=False)[0])
    assert sorted(each.index for each in found.landmarks) == [rows[place * LANDMARKS // 5] for place in range(5)]
    assert total(found) == pytest.approx(found.influence, abs=1e-12)
    for each in found.landmarks:
        assert each.influence == pytest.approx(ran.arrays["influence"][each.index], rel=1e-5)


def test_the_average_is_that_of_the_landmarks_alone(jobs: Jobs) -> None:
    """A shortlist was chosen for its influence."""
    ran = jobs.ran(REFINED)
    index = indices(ran, exact=False)[0]
    found = jobs.explained(REFINED, index)
    landmarks = indices(jobs.ran(PLAIN), exact=True)
    assert found.average == pytest.approx(ran.arrays["influence"][landmarks].mean(), rel=1e-5)
    assert len(found.landmarks) == ran.arrays["exact"].sum() > LANDMARKS
    assert total(found) == pytest.approx(found.influence, abs=1e-12)


def test_the_rest_of_fewer_neighbours_is_the_correction(jobs: Jobs) -> None:
    index = indices(jobs.ran(PLAIN), exact=False)[0]
    every, few, none = (jobs.explained(PLAIN, index, landmarks=count) for count in (100, 3, 0))
    assert [len(each.landmarks) for each in (every, few, none)] == [LANDMARKS, 3, 0]
    assert [each.index for each in few.landmarks] == [each.index for each in every.landmarks[:3]]
    for each in (every, few):
        assert sum(one.weight for one in each.landmarks) == pytest.approx(1)
    for each in (every, few, none):
        assert total(each) == pytest.approx(every.influence, abs=1e-12)


def test_what_took_a_sample_is_the_target_whose_turn_it_was(jobs: Jobs) -> None:
    changes = {**PLAIN, "budget": 30}
    ran, origin = jobs.ran(changes), jobs.origin(changes)
    P = np.load(ran.path(Stage.PROPAGATE, -1))
    free = {i for i in range(POOL) if i != MUTE}
    for rank, index in enumerate(ran.arrays["selected"].tolist()):
        found = origin.taken_by(ran.compute.store, rank)
        assert found is not None
        assert index == max(free, key=lambda i: (P[i, found.target], -i))
        assert found.pick == rank // (TARGET - 1)
        assert found.id == target_rows(TARGET, "python_function")[found.target]["id"]
        free.remove(index)
    assert jobs.origin({**PLAIN, "selection": "top_k"}).taken_by(ran.compute.store, 0) is None


@pytest.mark.parametrize(
    "changes",
    [PLAIN, REFINED, CURVED, GROWN, EXACT, COSINE],
    ids=["plain", "refined", "curved", "grown", "exact", "rds"],
)
def test_the_influence_on_the_targets_that_count_has_the_mean_that_is_shown(
    jobs: Jobs, changes: dict[str, Any]
) -> None:
    ran = jobs.ran(changes)
    for index in range(POOL):
        found = jobs.explained(changes, index)
        if index == MUTE:
            assert (found.explained_by, found.reason, found.influence) == ("none", "no_reply", None)
            assert (found.targets, found.landmarks, found.correction) == (None, [], None)
            continue
        assert found.influence == ran.arrays["influence"][index]
        assert found.targets is not None
        counted = [each.influence for each in found.targets.data if each.influence is not None]
        assert [each.influence for each in found.targets.data if not each.counts] == [None]
        assert [each.index for each in found.targets.data if not each.counts] == [MUTE_TARGET]
        assert np.float32(np.mean(counted)) == ran.arrays["influence"][index]
        expected = {"exact_influence": "own_gradient", "rds_plus": "embedding_similarity"}.get(
            changes.get("method", ""), "own_gradient" if ran.arrays["exact"][index] else "landmarks"
        )
        assert found.explained_by == expected
        assert (found.correction is None) == (expected != "landmarks")


def test_the_shortlists_influence_is_that_of_its_own_gradients(jobs: Jobs) -> None:
    """Not what was propagated to it before."""
    exact, refined, propagated = jobs.ran(EXACT), jobs.ran(REFINED), jobs.ran({**REFINED, "refine": 0})
    truth, before = (np.load(ran.path(Stage.PROPAGATE, -1)) for ran in (exact, propagated))
    rows = [i for i in indices(refined, exact=True) if not np.allclose(before[i], truth[i], atol=1e-4)]
    assert len(rows) == refined.summary["refined_count"] > 0
    for index in rows:
        found = jobs.explained(REFINED, index, target=2)
        assert found.targets is not None
        counted = {each.index: each.influence for each in found.targets.data if each.counts}
        assert list(counted.values()) == pytest.approx(truth[index, list(counted)], abs=1e-5)
        assert found.influence == pytest.approx(truth[index, 2], abs=1e-5)


@pytest.mark.parametrize("reason", ["not_finite", "refused"])
def test_a_sample_that_took_no_part_says_why(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    origin = jobs.origin(PLAIN)
    selected, prepared = origin.unit(Stage.SELECT), origin.unit(Stage.PREPARE)
    assert selected.result is not None
    assert prepared.result is not None
    assert selected.result["reasons"] == ["no_reply", "not_finite"]
    selected.result = {**selected.result, "reasons": [reason]}
    prepared.result["unusable"]["pool"]["first"] = [{"index": MUTE, "detail": "the roles [differ]"}]
    monkeypatch.setattr(Jobs, "origin", lambda *_: origin)
    found = jobs.explained(PLAIN, MUTE)
    assert (found.explained_by, found.reason, found.influence, found.targets) == ("none", reason, None, None)
    assert ("the roles [differ]" in found.sentence) == (reason == "refused")


def test_nothing_has_an_influence_on_a_target_that_does_not_count(jobs: Jobs) -> None:
    for changes in (PLAIN, EXACT):
        found = jobs.explained(changes, 0, target=MUTE_TARGET)
        assert (found.explained_by, found.influence, found.target) == ("none", None, MUTE_TARGET)
        assert found.targets is not None


def test_targets_come_in_pages_with_their_ids(jobs: Jobs) -> None:
    ids = [row["id"] for row in target_rows(TARGET, "python_function")]
    first = jobs.explained(EXACT, 0, targets_limit=10).targets
    rest = jobs.explained(EXACT, 0, first_target=10).targets
    beyond = jobs.explained(EXACT, 0, first_target=TARGET).targets
    assert first is not None
    assert rest is not None
    assert [each.id for each in first.data + rest.data] == ids
    assert [each.index for each in first.data + rest.data] == list(range(TARGET))
    assert (first.has_more, first.last_id, rest.has_more, rest.last_id) == (True, 9, False, TARGET - 1)
    assert beyond is not None
    assert (beyond.data, beyond.has_more, beyond.last_id) == ([], False, None)


def test_random_has_nothing_to_explain(jobs: Jobs) -> None:
    assert jobs.explained(RANDOM, MUTE).reason == "no_reply"
    found = jobs.explained(RANDOM, 3)
    assert (found.explained_by, found.targets, found.influence) == ("none", None, 0)
    assert "drawn from the seed" in found.sentence


class TestMissing:
    def test_a_removed_artifact_is_reported(self, jobs: Jobs) -> None:
        changes = {**PLAIN, "seed": 1}
        ran = jobs.ran(changes)
        index, store = indices(ran, exact=False)[0], ran.compute.store
        jobs.explained(changes, index)
        own = [unit.artifact_key for unit in ran.done[Stage.EMBED] if unit.spec["start"] <= index < unit.spec["stop"]]
        for key in (*own, ran.done[Stage.PROPAGATE][-1].result["explanation"], *ran.keys(Stage.PROPAGATE)):
            store.fs.mv(store._path(key), store._path("aside"))
            with pytest.raises(Unexplained, match=r"removed to free space. Post the same job again"):
                jobs.explained(changes, index)
            store.fs.mv(store._path("aside"), store._path(key))
        jobs.explained(changes, index)

    def test_contributions_that_do_not_add_up_are_not_shown(self, jobs: Jobs) -> None:
        changes = {**PLAIN, "seed": 2}
        ran = jobs.ran(changes)
        index = indices(ran, exact=False)[0]
        before = jobs.explained(changes, index)
        key = ran.done[Stage.PROPAGATE][-1].result["explanation"]
        with ran.compute.store.local(key) as path:
            tensors = load_file(path)
        tensors["coefficients"][0, 0] += 0.1 * tensors["coefficients"][0].abs().max()
        with ran.compute.store.writing(key) as path:
            save_file(tensors, path)
        assert before.influence != 0
        with pytest.raises(Unexplained, match="recomputed with different figures"):
            jobs.explained(changes, index)
        jobs.explained(changes, index, target=0)  # whose row is as it was
        landmark = indices(ran, exact=True)[0]
        P = np.load(ran.path(Stage.PROPAGATE, -1))
        P[landmark, 0] += 0.1
        with ran.compute.store.writing(ran.keys(Stage.PROPAGATE)[-1]) as path, path.open("wb") as file:
            np.save(file, P)
        with pytest.raises(Unexplained, match="recomputed with different figures"):
            jobs.explained(changes, landmark)

    @pytest.mark.parametrize("changes", [EXACT, PLAIN])
    def test_a_job_of_a_version_that_kept_less_says_so(
        self, jobs: Jobs, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        origin = jobs.origin(changes)
        for unit in origin.units:
            unit.result = {name: value for name, value in unit.result.items() if name != "reasons"}
        monkeypatch.setattr(Jobs, "origin", lambda *_: origin)
        with pytest.raises(Unexplained, match="a version of Winnow that stored less"):
            jobs.explained(changes, 0)


class TestSlices:
    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
    )
    def test_rows_of_a_tensor_are_those_of_the_library(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tensors = {"a": torch.randn(5, 3).to(dtype), "flat": torch.randn(7).to(dtype), "none": torch.empty(0, 3)}
        save_file(tensors, tmp_path / "file")
        with (tmp_path / "file").open("rb") as file:
            found = Tensors(file)
            np.testing.assert_array_equal(found.rows("a", 1, 4), tensors["a"][1:4].numpy())
            np.testing.assert_array_equal(found.row("a", 4), tensors["a"][4].numpy())
            np.testing.assert_array_equal(found.rows("flat", 0, found.length("flat")), tensors["flat"].numpy())
            assert found.rows("none", 0, 0).shape == (0, 3)
            for start, stop in ((5, 6), (-1, 1)):
                with pytest.raises(IndexError):
                    found.rows("a", start, stop)

    def test_a_row_of_an_array_is_read_alone(self, tmp_path: Path) -> None:
        array = np.arange(12, dtype=np.float32).reshape(4, 3)
        np.save(tmp_path / "a.npy", array)
        np.save(tmp_path / "f.npy", np.asfortranarray(array))
        with (tmp_path / "a.npy").open("rb") as file:
            np.testing.assert_array_equal(npy_row(file, 2), array[2])
        with (tmp_path / "f.npy").open("rb") as file, pytest.raises(ValueError, match="by columns"):
            npy_row(file, 2)

    def test_a_file_cut_short_is_an_error(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(5, 3)}, tmp_path / "file")
        whole = (tmp_path / "file").read_bytes()
        (tmp_path / "file").write_bytes(whole[:-4])
        with (tmp_path / "file").open("rb") as file, pytest.raises(EOFError, match="12 bytes were expected, 8"):
            Tensors(file).row("a", 4)
