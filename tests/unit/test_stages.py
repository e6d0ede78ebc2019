"""Whole jobs of every method against what plain torch says on the same tokens: one sample at a time, nothing approximated."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_job import Ran, down_projections, gradients, in_turns, is_optimum, load, loss_of, run, unit
from safetensors.numpy import load_file
from tiny import pool_rows, target_rows, write_jsonl

from service.jobs.state import Stage
from worker import data
from worker.influence import Samples, weighted_selection
from worker.stages.plan import VALIDATION_SAMPLES

POOL, TARGET, BUDGET = 40, 18, 8
WHOLE = {"projection_dim": None}
PLAIN = {"projection_dim": None, "normalize": False}
SGD = {"type": "sgd", "learning_rate": 1e-3}

Job = Callable[..., Ran]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("files")
    pool = write_jsonl(folder / "pool.jsonl", pool_rows(POOL))
    return pool, write_jsonl(folder / "target.jsonl", target_rows(TARGET, "python_function"))


@pytest.fixture(scope="module")
def job(tiny_llama: Path, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Runs a job on a store that all of this module share, so that equal work is done once; remembers finished ones."""
    folder, remembered = tmp_path_factory.mktemp("store"), {}

    def call(**changes: Any) -> Ran:
        name = json.dumps(changes, sort_keys=True)
        if name not in remembered:
            remembered[name] = run(tiny_llama, *files, folder, **{"budget": BUDGET, "validate": False, **changes})
        return remembered[name]

    return call


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("few")
    pool = write_jsonl(folder / "pool.jsonl", pool_rows(16))
    return pool, write_jsonl(folder / "target.jsonl", target_rows(5, "python_function"))


@dataclass(frozen=True)
class Truth:
    """The gradients of pool and target in full, float64."""

    model: Any
    pool: Samples
    target: Samples
    G_S: torch.Tensor
    G_T: torch.Tensor

    @property
    def cosine(self) -> torch.Tensor:
        return unit(self.G_S) @ unit(self.G_T).T


@pytest.fixture(scope="module")
def truth(tiny_llama: Path, job: Job) -> Truth:
    ran, model = job(method="exact_influence", gradient=WHOLE), load(tiny_llama)
    weights = list(down_projections(model).values())
    pool, target = ran.tokens("pool"), ran.tokens("target")
    return Truth(model, pool, target, gradients(model, pool, weights), gradients(model, target, weights))


def close(found: np.ndarray, expected: torch.Tensor, share: float = 1e-4) -> None:
    scale = float(expected.abs().max())
    assert np.abs(found - expected.numpy()).max() < share * scale


class TestExact:
    def test_it_is_the_cosine_of_every_samples_gradient(self, job: Job, truth: Truth) -> None:
        arrays = job(method="exact_influence", gradient=WHOLE).arrays
        close(arrays["influence"], truth.cosine.mean(dim=1))
        assert arrays["exact"].all()
        assert arrays["selected"].tolist() == in_turns(truth.cosine.numpy(), BUDGET, seed=0)

    def test_not_normalised_it_is_the_inner_product(self, job: Job, truth: Truth) -> None:
        arrays = job(method="exact_influence", gradient=PLAIN, selection="top_k").arrays
        expected = (truth.G_S @ truth.G_T.T).mean(dim=1)
        close(arrays["influence"], expected)
        assert arrays["selected"].tolist() == expected.argsort(descending=True)[:BUDGET].tolist()

    def test_nothing_is_embedded_or_propagated(self, job: Job) -> None:
        ran = job(method="exact_influence", gradient=WHOLE)
        assert set(ran.done) == {
            *(Stage.PREPARE, Stage.LANDMARK_GRADIENTS, Stage.TARGET_GRADIENTS),
            Stage.PROPAGATE,
            Stage.SELECT,
        }
        assert ran.summary["fidelity"] is None


def test_rds_plus_is_the_cosine_of_position_weighted_hidden_states(job: Job, truth: Truth) -> None:
    def embeddings(samples: Samples) -> torch.Tensor:
        rows = []
        for i in range(len(samples)):
            ids = torch.from_numpy(samples.input_ids[samples.offsets[i] : samples.offsets[i + 1]].astype(np.int64))
            with torch.no_grad():
                hidden = truth.model.model(input_ids=ids[None]).last_hidden_state[0].double()
            weight = torch.arange(1, len(ids) + 1, dtype=torch.float64)
            rows.append(weight @ hidden / weight.sum())
        return unit(torch.stack(rows))

    ran = job(method="rds_plus")
    cosine = embeddings(truth.pool) @ embeddings(truth.target).T
    assert np.abs(ran.arrays["influence"] - cosine.mean(dim=1).numpy()).max() < 1e-3  # embeddings are kept in float16
    gaps = [
        float(cosine[a].max() - cosine[b].max())
        for a, b in zip(ran.selected, in_turns(cosine.numpy(), BUDGET, 0), strict=True)
    ]
    assert np.abs(gaps).max() < 1e-3
    assert ran.summary["landmark_count"] == 0


def test_random_draws_from_the_seed_alone(job: Job) -> None:
    one, two = job(method="random"), job(method="random", seed=1)
    assert one.selected != two.selected
    assert len(set(one.selected)) == BUDGET
    assert not one.arrays["exact"].any()
    assert set(one.done) == {Stage.PREPARE, Stage.SELECT}


class TestRefine:
    @pytest.mark.parametrize("selection", ["round_robin", "top_k", "weighted"])
    def test_what_is_chosen_is_exact(self, job: Job, truth: Truth, selection: str) -> None:
        ran = job(gradient=PLAIN, selection=selection, refine=0.3)
        arrays, expected = ran.arrays, (truth.G_S @ truth.G_T.T).mean(dim=1)
        exact = arrays["exact"]
        assert exact[arrays["selected"]].all()
        assert 12 < exact.sum() <= 12 + math.ceil(0.3 * POOL)
        assert np.abs(arrays["influence"] - expected.numpy())[exact].max() < 1e-4 * float(expected.abs().max())
        assert ran.summary["refined_count"] == exact.sum() - 12

    @pytest.mark.parametrize("selection", ["round_robin", "top_k", "weighted"])
    def test_of_the_whole_pool_it_selects_what_the_exact_method_does(self, job: Job, selection: str) -> None:
        refined = job(gradient=PLAIN, selection=selection, refine=1.0).arrays
        exact = job(method="exact_influence", gradient=PLAIN, selection=selection).arrays
        assert refined["exact"].all()
        assert refined["selected"].tolist() == exact["selected"].tolist()
        assert refined["weight"] == pytest.approx(exact["weight"], rel=1e-4)
        assert refined["influence"] == pytest.approx(exact["influence"], rel=1e-4, abs=1e-7)

    def test_half_of_the_shortlist_is_chosen_by_turns_and_half_by_the_mean(self, job: Job) -> None:
        ran = job(gradient=WHOLE, refine=0.3)
        P = np.load(ran.path(Stage.PROPAGATE))
        (round_,) = ran.done[Stage.PROPAGATE][0].spec["landmarks"]
        P[data.read_indices(ran.compute.store, round_["tokens"])] = -np.inf
        by_turns = in_turns(P, 6, seed=0)
        P[by_turns] = -np.inf
        by_mean = np.argsort(-P.mean(axis=1), kind="stable")[:6].tolist()
        shortlist = ran.done[Stage.REFINE][0].spec["tokens"]
        assert data.read_indices(ran.compute.store, shortlist).tolist() == sorted(by_turns + by_mean)

    def test_without_it_landmarks_alone_are_exact(self, job: Job) -> None:
        ran = job(gradient=WHOLE, refine=0)
        assert ran.arrays["exact"].sum() == 12
        assert Stage.REFINE not in ran.done
        assert ran.summary["refined_count"] == 0


class TestMinFidelity:
    def test_landmarks_grow_reusing_the_earlier_ones_and_end_exact(self, job: Job, truth: Truth) -> None:
        before = job(gradient=WHOLE, landmarks={"count": 6}, refine=0.1)
        ran = job(gradient=WHOLE, landmarks={"count": 6}, refine=0.1, min_fidelity=0.999)
        rounds = [unit.result.get("grow") for unit in ran.done[Stage.PROPAGATE]]
        assert [round_ and round_["count"] for round_ in rounds] == [12, 24, POOL, None]
        keys = ran.keys(Stage.LANDMARK_GRADIENTS)
        assert keys[: len(before.keys(Stage.LANDMARK_GRADIENTS))] == before.keys(Stage.LANDMARK_GRADIENTS)
        assert len(set(keys)) == len(keys)
        assert sum(unit.result["rows"] for unit in ran.done[Stage.LANDMARK_GRADIENTS]) == POOL
        assert ran.arrays["exact"].all()
        close(ran.arrays["influence"], truth.cosine.mean(dim=1))
        assert ran.selected == job(method="exact_influence", gradient=WHOLE).selected
        assert any("exact gradients of all 40 usable samples cost no more" in note for note in ran.summary["notes"])

    @pytest.mark.parametrize("changes", [{"seed": 1}, {"landmarks": {"count": 6, "choice": "uniform"}}])
    def test_each_seed_and_choice_grows_in_an_order_of_its_own(self, job: Job, changes: dict[str, Any]) -> None:
        grown = {"gradient": WHOLE, "landmarks": {"count": 6}, "refine": 0.1, "min_fidelity": 0.999}
        for ran in (job(**grown), job(**{**grown, **changes})):
            assert ran.arrays["exact"].all(), "landmarks of several rounds are the same"

    def test_with_the_shortlist_exact_gradients_of_all_may_cost_no_more(self, job: Job) -> None:
        ran = job(gradient=WHOLE, landmarks={"count": 6}, refine=0.5, min_fidelity=0.999)
        rounds = [unit.result.get("grow") for unit in ran.done[Stage.PROPAGATE]]
        assert [round_ and round_["count"] for round_ in rounds] == [12, POOL, None]

    def test_where_it_is_met_nothing_grows(self, job: Job) -> None:
        uniform = {"count": 30, "choice": "uniform"}
        easy = job(gradient=WHOLE, landmarks=uniform, refine=0.1)
        reached = easy.summary["fidelity"]["mean_spearman"]
        assert reached > 0.05, "choose another seed: this one shows nothing"
        ran = job(gradient=WHOLE, landmarks=uniform, refine=0.1, min_fidelity=reached - 0.01)
        assert ran.keys(Stage.LANDMARK_GRADIENTS) == easy.keys(Stage.LANDMARK_GRADIENTS)
        assert ran.arrays["exact"].sum() < POOL
        assert any("is met by 30 landmarks" in note for note in ran.summary["notes"])

    def test_beyond_the_most_landmarks_it_is_said(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("worker.stages.propagate.MOST_LANDMARKS", 10)
        ran = job(gradient=WHOLE, landmarks={"count": 8}, refine=0.1, min_fidelity=0.999, seed=5)
        assert ran.summary["landmark_count"] == 8
        assert any("is not met by 8 landmarks" in note for note in ran.summary["notes"])


class TestLandmarks:
    def test_more_than_there_are_samples_are_lowered_and_that_is_said(self, job: Job) -> None:
        ran = job(gradient=WHOLE, landmarks={"count": 1000})
        assert ran.prepared["landmark_count"] == POOL
        assert ran.selected == job(method="exact_influence", gradient=WHOLE).selected
        notes = ran.summary["notes"]
        assert any("landmarks.count is 1000: lowered to the 40 usable" in note for note in notes)
        assert any("every influence is exact" in note for note in notes)

    def test_stratified_ones_hold_every_source_in_its_share(self, job: Job) -> None:
        ran = job(gradient=WHOLE, landmarks={"count": 20, "choice": "stratified"}, refine=0)
        sources = [row["source"] for row in pool_rows(POOL)]
        chosen = Counter(sources[i] for i in np.flatnonzero(ran.arrays["exact"]))
        for source, count in Counter(sources).items():
            assert abs(chosen[source] - count / 2) <= 1

    def test_auto_takes_the_cheapest_candidate_close_to_the_best(self, job: Job) -> None:
        ran = job(gradient=WHOLE, embedding={"kind": "auto"}, landmarks={"count": 20})
        table = ran.summary["embedding"]["candidates"]
        best = max(entry["mean_spearman"] for entry in table)
        close_ones = [entry for entry in table if entry["mean_spearman"] >= best - 0.01]
        (chosen,) = (entry for entry in table if entry["chosen"])
        assert chosen["cost"] == min(entry["cost"] for entry in close_ones)
        assert {chosen[name] for name in ("kind",)} == {ran.summary["embedding"]["chosen"]["kind"]}
        assert [entry["pooling"] for entry in table] == ["response", "last"]
        named = {name: chosen[name] for name in ("kind", "pooling")}
        assert job(gradient=WHOLE, embedding=named, landmarks={"count": 20}).selected == ran.selected

    def test_auto_offers_the_named_pooling_alone(self, job: Job) -> None:
        ran = job(gradient=WHOLE, embedding={"kind": "auto", "pooling": "last"}, refine=0)
        assert {candidate["pooling"] for candidate in ran.prepared["candidates"]} == {"last"}

    def test_candidates_are_compared_on_the_first_landmarks_alone(
        self, job: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        auto = {"gradient": WHOLE, "embedding": {"kind": "auto"}, "refine": 0}
        few = job(**auto, landmarks={"count": 10})
        monkeypatch.setattr("worker.stages.prepare._MOST_COMPARED", 10)
        ran = job(**auto, landmarks={"count": 14})
        assert ran.keys(Stage.CANDIDATES) == few.keys(Stage.CANDIDATES)
        found, expected = ([e["mean_r2"] for e in r.summary["embedding"]["candidates"]] for r in (ran, few))
        assert found == pytest.approx(expected, rel=1e-3)
        assert ran.summary["landmark_count"] == 14


class TestWeighted:
    def test_first_order_is_the_closed_form(self, job: Job, truth: Truth) -> None:
        arrays = job(method="exact_influence", gradient=PLAIN, selection="weighted").arrays
        p = np.sort((truth.G_S @ truth.G_T.T).mean(dim=1).numpy())[::-1]
        gaps = p[:BUDGET] - p[BUDGET]
        assert arrays["weight"][arrays["selected"]] == pytest.approx(BUDGET * gaps / gaps.sum(), rel=1e-3)

    @pytest.mark.parametrize("kind", ["fisher", "ggn", "hessian"])
    @pytest.mark.parametrize("method", ["influence_distillation", "exact_influence"])
    def test_second_order_comes_with_its_certificate(self, job: Job, kind: str, method: str) -> None:
        curvature = {"type": kind} if kind == "fisher" else {"type": kind, "rank": 4}
        ran = job(
            method=method,
            gradient=PLAIN,
            selection="weighted",
            curvature=curvature,
            optimizer={**SGD, "learning_rate": 1},
        )
        solution = ran.summary["solution"]
        assert solution["kkt_residual"] < 1e-8
        assert 0 <= solution["duality_gap"] < 1e-8
        assert solution["support"] == BUDGET == len(ran.selected)
        if method == "influence_distillation":
            assert len(ran.summary["fidelity"]["spearman"]) == TARGET, "of the targets, not of the curvature's columns"
        if kind == "hessian":  # all its directions may bend downwards, and are clipped
            assert 0 <= solution["clipped_eigenvalues"] <= 4
            return
        first = job(method=method, gradient=PLAIN, selection="weighted").arrays["weight"]
        assert np.abs(ran.arrays["weight"] - first).max() > 1e-2, "the curvature does nothing at this learning rate"

    @pytest.mark.parametrize("rate", [0.5, 3.0])
    def test_fisher_is_the_optimum_of_the_objective_with_the_targets_outer_products(
        self, job: Job, truth: Truth, rate: float
    ) -> None:
        sgd = {"type": "sgd", "learning_rate": rate}
        ran = job(
            method="exact_influence", gradient=PLAIN, selection="weighted", curvature={"type": "fisher"}, optimizer=sgd
        )
        P = (truth.G_S @ truth.G_T.T).numpy()
        is_optimum(ran, P.mean(axis=1), P @ P.T / (POOL * TARGET), rate)

    def test_the_held_out_choice_is_that_of_the_other_targets(self, job: Job, truth: Truth) -> None:
        sgd = {"type": "sgd", "learning_rate": 0.5, "weight_decay": 1.0}
        fisher = {"selection": "weighted", "curvature": {"type": "fisher"}, "optimizer": sgd}
        arrays = job(method="exact_influence", gradient=PLAIN, **fisher).arrays
        half = np.setdiff1d(np.arange(TARGET), arrays["held_out_targets"])
        weights = torch.cat([w.detach().flatten() for w in down_projections(truth.model).values()]).double()
        P, slopes = truth.G_S @ truth.G_T[half].T, truth.G_T[half] @ weights
        expected = weighted_selection(
            (P.mean(dim=1) - 0.5 * P @ slopes / len(half)).numpy(),
            budget=BUDGET,
            factors=(P.numpy(), np.eye(len(half)) / (POOL * len(half))),
            learning_rate=0.5,
        ).weights
        assert sorted(arrays["held_out_selected"]) == np.flatnonzero(expected).tolist()
        found = arrays["held_out_weight"] * POOL / BUDGET
        assert found == pytest.approx(expected[arrays["held_out_selected"]], rel=1e-2, abs=1e-2)
        assert (np.diff(found) <= 0).all(), "the best comes first"

    def test_directions_are_of_the_landmarks_of_highest_influence(self, job: Job, truth: Truth) -> None:
        ggn = {"selection": "weighted", "curvature": {"type": "ggn", "rank": 1}, "optimizer": SGD}
        ran = job(method="exact_influence", gradient=PLAIN, **ggn)
        best = (truth.G_S @ truth.G_T.T).mean(dim=1).argsort(descending=True)[:8]
        expected = torch.linalg.svd(truth.G_S[best], full_matrices=False).Vh[0]
        found = load_file(ran.path(Stage.CURVATURE))["directions"][0]
        assert abs(float(expected @ torch.from_numpy(found).double())) > 0.999

    @pytest.mark.parametrize("decay", [0.0, 0.3])
    def test_hessian_is_the_optimum_with_second_derivatives(
        self, tiny_llama: Path, few: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, decay: float
    ) -> None:
        """Directions enough to span all gradients of the pool; the reference differentiates twice."""
        folder = (
            tmp_path_factory.getbasetemp() / "hessian"
        )  # of both: another drift must not find the work of the first
        how = {"selection": "weighted", "curvature": {"type": "hessian", "rank": 16}, "validate": False}
        sgd = {"type": "sgd", "learning_rate": 0.5, "weight_decay": decay}
        ran = run(tiny_llama, *few, folder, budget=4, method="exact_influence", gradient=PLAIN, optimizer=sgd, **how)
        model = load(tiny_llama)
        weights = list(down_projections(model).values())
        G_S, G_T = (gradients(model, ran.tokens(name), weights) for name in ("pool", "target"))
        drift = decay * torch.cat([w.detach().flatten() for w in weights]).double()
        HV = curved(model, ran.tokens("target"), torch.cat([G_S, drift[None]]))
        p = G_S @ (G_T.mean(dim=0) - 0.5 * HV[-1])
        is_optimum(ran, p.numpy(), (G_S @ HV[:-1].T / len(G_S)).numpy(), 0.5)


def curved(model: Any, targets: Samples, V: torch.Tensor) -> torch.Tensor:
    """H v of the mean target loss for each row v, by autograd over autograd."""
    weights = list(down_projections(model).values())
    model.set_attn_implementation("eager")  # fused attention has no second derivative
    for weight in weights:
        weight.requires_grad_(True)
    loss = torch.stack([loss_of(model, targets, j) for j in range(len(targets))]).mean()
    slopes = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)])
    rows = []
    for v in V:
        found = torch.autograd.grad(slopes @ v.float(), weights, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in found]).double())
    return torch.stack(rows)


SELECTED = {"method": "exact_influence", "gradient": WHOLE, "validate": True}


class TestValidation:
    def test_a_small_step_of_sgd_does_what_is_predicted(self, job: Job, truth: Truth) -> None:
        ran = job(**SELECTED, optimizer={"type": "sgd", "learning_rate": 5e-3})
        found = ran.summary["validation"]
        step = -5e-3 * truth.G_S[ran.selected].mean(dim=0)
        expected = float(truth.G_T.mean(dim=0) @ step)
        assert found["selection"]["predicted"] == pytest.approx(expected, rel=1e-3)
        for arm in (found["selection"], found["held_out"]["selection"]):
            assert arm["measured"] == pytest.approx(arm["predicted"], rel=0.02)
        with torch.no_grad():
            losses = [float(loss_of(truth.model, truth.target, j)) for j in range(TARGET)]
        assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert found["selection"]["measured"] < found["random"]["measured"]
        half, chosen = ran.arrays["held_out_targets"], ran.arrays["held_out_selected"]
        expected = -5e-3 * float(truth.G_T[half].mean(dim=0) @ truth.G_S[chosen].mean(dim=0))
        assert found["held_out"]["selection"]["predicted"] == pytest.approx(expected, rel=1e-3)
        assert found["held_out"]["loss"] == pytest.approx(np.mean(np.array(losses)[half]), rel=1e-5)
        assert found["held_out"]["random"]["measured"] != found["random"]["measured"]
        assert f"{found['selection']['measured']:+.2e}" in found["sentence"]

    def test_the_held_out_half_had_no_part_in_its_selection(self, job: Job, truth: Truth) -> None:
        arrays = job(**SELECTED, optimizer={"type": "sgd", "learning_rate": 5e-3}).arrays
        held_out = arrays["held_out_targets"]
        assert len(set(held_out.tolist())) == TARGET // 2
        P = truth.cosine.numpy()[:, np.setdiff1d(np.arange(TARGET), held_out)]
        assert arrays["held_out_selected"].tolist() == in_turns(P, BUDGET, seed=0)

    def test_few_targets_are_not_halved(self, tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
        for count, held_out in ((15, None), (16, 8)):
            few = write_jsonl(tmp_path / "few.jsonl", target_rows(count, "python_function"))
            found = run(tiny_llama, files[0], few, tmp_path / "store", refine=0).summary["validation"]["held_out"]
            assert (found and found["targets"]) == held_out

    def test_it_is_measured_in_float32_on_a_batch_of_a_large_selection(self, job: Job, truth: Truth) -> None:
        found = job(method="random", dtype="bfloat16", budget=36, validate=True).summary["validation"]
        with torch.no_grad():
            losses = [float(loss_of(truth.model, truth.target, j)) for j in range(TARGET)]
        assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert found["samples"] == VALIDATION_SAMPLES < 36

    def test_each_sample_steps_with_its_own_weight(self, job: Job, truth: Truth) -> None:
        how = {"gradient": PLAIN, "selection": "weighted", "optimizer": {"type": "sgd", "learning_rate": 5e-3}}
        ran = job(method="exact_influence", validate=True, **how)
        weights = torch.from_numpy(ran.arrays["weight"]).double()
        expected = -5e-3 * float(truth.G_T.mean(dim=0) @ (weights @ truth.G_S) / weights.sum())
        assert ran.summary["validation"]["selection"]["predicted"] == pytest.approx(expected, rel=1e-3)

    def test_every_method_is_validated(self, job: Job) -> None:
        for method in ("influence_distillation", "rds_plus", "random"):
            found = job(method=method, validate=True).summary["validation"]
            assert all(
                math.isfinite(found[arm][name]) for arm in ("selection", "random") for name in ("measured", "predicted")
            )

    @pytest.mark.parametrize("kind", ["fisher", "ggn", "hessian"])
    def test_with_a_curvature_the_second_order_is_predicted_too(self, job: Job, kind: str) -> None:
        curvature = {"type": kind} if kind == "fisher" else {"type": kind, "rank": 4}
        ran = job(
            gradient=PLAIN,
            selection="weighted",
            curvature=curvature,
            optimizer={**SGD, "learning_rate": 0.05},
            validate=True,
        )
        arm = ran.summary["validation"]["selection"]
        if kind != "hessian":  # which alone may bend downwards
            assert arm["predicted_second_order"] > arm["predicted"]
        else:
            assert abs(arm["predicted_second_order"] - arm["measured"]) < abs(arm["predicted"] - arm["measured"])

    def test_without_it_there_is_none(self, job: Job) -> None:
        ran = job(method="random")
        assert Stage.VALIDATE not in ran.done
        assert ran.summary["validation"] is None
