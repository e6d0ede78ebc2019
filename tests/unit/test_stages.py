"""Whole jobs of every method against what plain torch says on the same tokens: one sample at a time, nothing approximated."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.local_job import (
    Ran,
    Truth,
    close,
    down_projections,
    gradients,
    gradients_of,
    in_turns,
    is_optimum,
    load,
    loss_of,
    remembering,
    run,
    unit,
    write_files,
)
from support.tiny import target_rows, write_jsonl

from service.plan.limits import VALIDATION_SAMPLES
from service.plan.stages import Stage
from worker.influence import Samples, weighted_selection

POOL, TARGET, BUDGET = 40, 18, 8
WHOLE = {"projection_dim": None}
PLAIN = {"projection_dim": None, "normalize": False}
SGD = {"type": "sgd", "learning_rate": 1e-3}

Job = Callable[..., Ran]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_files(tmp_path_factory.mktemp("files"), POOL, TARGET)


@pytest.fixture(scope="module")
def job(tiny_llama: Path, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Job:
    return remembering(tiny_llama, *files, tmp_path_factory.mktemp("store"), budget=BUDGET, validate=False)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_files(tmp_path_factory.mktemp("few"), 16, 5)


@pytest.fixture(scope="module")
def truth(tiny_llama: Path, job: Job) -> Truth:
    ran, model = job(method="exact_influence", gradient=WHOLE), load(tiny_llama)
    weights = list(down_projections(model).values())
    return Truth(model, ran.tokens("pool"), ran.tokens("target"), *gradients_of(ran, model, weights))


def losses(truth: Truth) -> list[float]:
    with torch.no_grad():
        return [float(loss_of(truth.model, truth.target, j)) for j in range(TARGET)]


def curvature(kind: str, rank: int = 4) -> dict[str, Any]:
    return {"type": kind} if kind == "fisher" else {"type": kind, "rank": rank}


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
        stages = ("prepare", "landmark_gradients", "target_gradients", "propagate", "select")
        assert set(ran.done) == {Stage(name) for name in stages}
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
    best = cosine.max(dim=1).values
    assert (best[ran.selected] - best[in_turns(cosine.numpy(), BUDGET, 0)]).abs().max() < 1e-3
    assert ran.summary["landmark_count"] == 0


def test_random_draws_from_the_seed_alone(job: Job) -> None:
    one, two = job(method="random"), job(method="random", seed=1)
    assert one.selected != two.selected
    assert len(set(one.selected)) == BUDGET
    assert not one.arrays["exact"].any()
    assert set(one.done) == {Stage.PREPARE, Stage.SELECT}


class TestWeighted:
    def test_first_order_is_the_closed_form(self, job: Job, truth: Truth) -> None:
        arrays = job(method="exact_influence", gradient=PLAIN, selection="weighted").arrays
        p = np.sort((truth.G_S @ truth.G_T.T).mean(dim=1).numpy())[::-1]
        gaps = p[:BUDGET] - p[BUDGET]
        assert arrays["weight"][arrays["selected"]] == pytest.approx(BUDGET * gaps / gaps.sum(), rel=1e-3)

    @pytest.mark.parametrize("kind", ["fisher", "ggn", "hessian"])
    @pytest.mark.parametrize("method", ["influence_distillation", "exact_influence"])
    def test_second_order_comes_with_its_certificate(self, job: Job, kind: str, method: str) -> None:
        how = {"method": method, "gradient": PLAIN, "selection": "weighted"}
        ran = job(**how, curvature=curvature(kind), optimizer={**SGD, "learning_rate": 1})
        solution = ran.summary["solution"]
        assert solution["kkt_residual"] < 1e-8
        assert 0 <= solution["duality_gap"] < 1e-8
        assert solution["support"] == BUDGET == len(ran.selected)
        if method == "influence_distillation":
            assert len(ran.summary["fidelity"]["spearman"]) == TARGET, "of the targets, not of the curvature's columns"
        if kind == "hessian":  # all its directions may bend downwards, and are clipped
            assert 0 <= solution["clipped_eigenvalues"] <= 4
            return
        first = job(**how).arrays["weight"]
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

    @pytest.mark.parametrize("kind", ["ggn", "hessian"])
    def test_curvature_does_not_choose_the_ridge_of_the_targets(self, job: Job, kind: str) -> None:
        how = {"gradient": PLAIN, "selection": "weighted", "landmarks": {"count": 20}, "refine": 0, "optimizer": SGD}
        first, second = (
            job(**how, kernel={"ridge": None}, curvature=given).done[Stage.PROPAGATE][0].result["delta"]
            for given in ({"type": "none"}, {"type": kind, "rank": 8})
        )
        assert first == second

    @pytest.mark.slow
    def test_the_held_out_choice_has_the_curvature_of_the_other_targets(self, tiny_llama: Path, tmp_path: Path) -> None:
        """Directions enough to span all gradients of the pool, a Hessian, and weight decay that it turns."""
        sgd = {"type": "sgd", "learning_rate": 0.5, "weight_decay": 0.3}
        how = {"selection": "weighted", "curvature": curvature("hessian", 16), "optimizer": sgd, "gradient": PLAIN}
        ran = run(tiny_llama, *write_files(tmp_path, 16, 16), tmp_path, budget=4, method="exact_influence", **how)
        arrays, model = ran.arrays, load(tiny_llama)
        weights = list(down_projections(model).values())
        G_S = gradients(model, ran.tokens("pool"), weights)
        b = 0.3 * torch.cat([w.detach().flatten() for w in weights]).double()

        def expected(targets: np.ndarray) -> np.ndarray:
            chosen = ran.tokens("target").take(targets)
            G_T, HV = gradients(model, chosen, weights), curved(model, chosen, torch.cat([G_S, b[None]]))
            p, Q = G_S @ (G_T.mean(dim=0) - 0.5 * HV[-1]), G_S @ HV[:-1].T / 16
            factors = (np.eye(16), ((Q + Q.T) / 2).numpy())
            return weighted_selection(p.numpy(), budget=4, factors=factors, learning_rate=0.5).weights / 4

        held_in = expected(np.setdiff1d(np.arange(16), arrays["held_out_targets"]))
        found = np.zeros(16)
        found[arrays["held_out_selected"]] = arrays["held_out_weight"]
        assert found == pytest.approx(held_in, abs=0.02)
        assert np.abs(found - expected(np.arange(16))).max() > 0.1, (
            "choose other targets: the halves are too much alike"
        )

    def test_directions_are_of_the_landmarks_of_highest_influence(self, job: Job, truth: Truth) -> None:
        ggn = {"selection": "weighted", "curvature": {"type": "ggn", "rank": 1}, "optimizer": SGD}
        ran = job(method="exact_influence", gradient=PLAIN, **ggn)
        best = (truth.G_S @ truth.G_T.T).mean(dim=1).argsort(descending=True)[:8]
        expected = torch.linalg.svd(truth.G_S[best], full_matrices=False).Vh[0]
        found = load_file(ran.path(Stage.CURVATURE))["V"][0]
        assert abs(float(expected @ torch.from_numpy(found).double())) > 0.999

    @pytest.mark.parametrize("decay", [0.0, 0.3])
    def test_hessian_is_the_optimum_with_second_derivatives(
        self, tiny_llama: Path, few: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, decay: float
    ) -> None:
        """Directions enough to span all gradients of the pool; the reference differentiates twice."""
        folder = (
            tmp_path_factory.getbasetemp() / "hessian"
        )  # shared: another offset must not find the work of the first
        how = {"selection": "weighted", "curvature": {"type": "hessian", "rank": 16}, "validate": False}
        sgd = {"type": "sgd", "learning_rate": 0.5, "weight_decay": decay}
        ran = run(tiny_llama, *few, folder, budget=4, method="exact_influence", gradient=PLAIN, optimizer=sgd, **how)
        model = load(tiny_llama)
        weights = list(down_projections(model).values())
        G_S, G_T = gradients_of(ran, model, weights)
        b = decay * torch.cat([w.detach().flatten() for w in weights]).double()
        HV = curved(model, ran.tokens("target"), torch.cat([G_S, b[None]]))
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
        assert found["loss"] == pytest.approx(np.mean(losses(truth)), rel=1e-5)
        assert found["selection"]["measured"] < found["random"]["measured"]
        half, chosen = ran.arrays["held_out_targets"], ran.arrays["held_out_selected"]
        expected = -5e-3 * float(truth.G_T[half].mean(dim=0) @ truth.G_S[chosen].mean(dim=0))
        assert found["held_out"]["selection"]["predicted"] == pytest.approx(expected, rel=1e-3)
        assert found["held_out"]["loss"] == pytest.approx(np.mean(np.array(losses(truth))[half]), rel=1e-5)
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
        assert found["loss"] == pytest.approx(np.mean(losses(truth)), rel=1e-5)
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
        how = {"gradient": PLAIN, "selection": "weighted", "validate": True}
        ran = job(**how, curvature=curvature(kind), optimizer={**SGD, "learning_rate": 0.05})
        arm = ran.summary["validation"]["selection"]
        if kind != "hessian":  # which alone may bend downwards
            assert arm["predicted_second_order"] > arm["predicted"]
        else:
            assert abs(arm["predicted_second_order"] - arm["measured"]) < abs(arm["predicted"] - arm["measured"])

    def test_without_it_there_is_none(self, job: Job) -> None:
        ran = job(method="random")
        assert Stage.VALIDATE not in ran.done
        assert ran.summary["validation"] is None
