"""Whole jobs that refine, in one round or more, and that ask for more landmarks first."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.local_job import (
    Ran,
    Truth,
    close,
    down_projections,
    gradients_of,
    in_turns,
    load,
    remembering,
    write_files,
)

from service.plan.stages import Stage
from worker.stages import rounds
from worker.text import token_files

POOL, TARGET, BUDGET = 40, 18, 8
WHOLE = {"projection_dim": None}
PLAIN = {"projection_dim": None, "normalize": False}

Job = Callable[..., Ran]


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    files = write_files(tmp_path_factory.mktemp("files"), POOL, TARGET)
    return remembering(tiny_llama, *files, tmp_path_factory.mktemp("store"), budget=BUDGET, validate=False)


@pytest.fixture(scope="module")
def truth(tiny_llama: Path, job: Job) -> Truth:
    ran, model = job(method="exact_influence", gradient=WHOLE), load(tiny_llama)
    weights = list(down_projections(model).values())
    return Truth(model, ran.tokens("pool"), ran.tokens("target"), *gradients_of(ran, model, weights))


class TestRefine:
    @pytest.mark.parametrize("selection", ["round_robin", "top_k", "weighted"])
    def test_what_is_chosen_is_exact(self, job: Job, truth: Truth, selection: str) -> None:
        ran = job(gradient=PLAIN, selection=selection, refine=0.3)
        arrays, expected = ran.arrays, (truth.G_S @ truth.G_T.T).mean(dim=1)
        exact = arrays["exact"]
        assert exact[arrays["selected"]].all()
        assert 12 < exact.sum() <= 12 + math.ceil(0.3 * POOL)
        close(arrays["influence"] * exact, expected * torch.from_numpy(exact))
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
        ran, before = job(gradient=WHOLE, refine=0.3), job(gradient=WHOLE, refine=0)
        P = np.load(before.path(Stage.PROPAGATE))
        (round_,) = ran.done[Stage.PROPAGATE][0].spec["landmarks"]
        P[token_files.read_indices(ran.compute.store, round_["tokens"])] = -np.inf
        by_turns = in_turns(P, 6, seed=0)
        P[by_turns] = -np.inf
        by_mean = np.argsort(-P.mean(axis=1), kind="stable")[:6].tolist()
        shortlist = ran.done[Stage.REFINE][0].spec["tokens"]
        assert token_files.read_indices(ran.compute.store, shortlist).tolist() == sorted(by_turns + by_mean)

    def test_each_round_chooses_among_what_is_predicted_from_all_rounds_before(self, job: Job) -> None:
        ran = job(gradient=WHOLE, refine={"size": 1.5, "rounds": 3})
        indices = [
            set(token_files.read_indices(ran.compute.store, unit.result["shortlist"]["tokens"]).tolist())
            for unit in ran.done[Stage.PROPAGATE][:-1]
        ]
        assert [len(rows) for rows in indices] == [4, 4, 4]
        assert len(set.union(*indices)) == 12
        one = job(gradient=WHOLE, refine={"size": 1.5, "rounds": 1})
        assert one.arrays["exact"].sum() == ran.arrays["exact"].sum() == 24
        found = ran.summary["refinement"]
        assert (found["refined"], found["times_budget"], found["stopped"]) == (12, 1.5, "size")
        assert [round_["refined"] for round_ in found["rounds"]] == [4, 8, 12]

    @pytest.mark.parametrize("selection", ["round_robin", "top_k", "weighted"])
    def test_it_stops_once_enough_is_promised(self, job: Job, selection: str) -> None:
        def refined(**refine: float) -> dict[str, Any]:
            found = job(gradient=WHOLE, landmarks={"count": 6}, selection=selection, refine={"rounds": 4, **refine})
            return dict(found.summary["refinement"])

        easy, hard = refined(max_cost=10, min_captured=0.05), refined(max_cost=10, min_captured=0.9999)
        assert easy["stopped"] == "promised"
        assert BUDGET <= easy["refined"] < hard["refined"] == POOL - 6
        assert (hard["stopped"], hard["promise"]) == ("pool", pytest.approx(1))
        capped = refined(max_cost=0.01, min_captured=0.9999)
        assert (capped["stopped"], capped["refined"]) == ("max_cost", 2 * BUDGET)
        assert 0 < capped["promise"] < 1

    def test_a_promise_knows_the_residuals_of_landmarks_alone(self, tmp_path: Path) -> None:
        """What was refined is no random part of the pool, so its residuals say nothing about the rest."""
        draw = np.random.default_rng(0)
        P = draw.normal(size=(POOL, TARGET)).astype(np.float32)
        exact = np.arange(20)
        left_out = P[exact] + draw.normal(scale=0.1, size=(20, TARGET))
        left_out[12:] = np.nan
        known = rounds.Known(
            P_nx=P,
            valid=np.arange(TARGET),
            eligible=np.ones(POOL, dtype=bool),
            exact=exact,
            is_landmark=exact < 12,
            P_et=P[exact].astype(np.float64),
            left_out_et=left_out,
            tried=8,
            most=8,
        )
        job: Any = SimpleNamespace(budget=BUDGET, parameters={"selection": "round_robin", "seed": 0})
        promised = rounds._promise(SimpleNamespace(job=job), known, np.arange(POOL) >= 20, tmp_path)
        assert promised is not None
        assert 0 < promised < 1

    def test_without_it_landmarks_alone_are_exact(self, job: Job) -> None:
        ran = job(gradient=WHOLE, refine=0)
        assert ran.arrays["exact"].sum() == 12
        assert Stage.REFINE not in ran.done
        assert ran.summary["refined_count"] == 0


class TestMinFidelity:
    def test_landmarks_grow_reusing_the_earlier_ones_and_end_exact(self, job: Job, truth: Truth) -> None:
        before = job(gradient=WHOLE, landmarks={"count": 6}, refine=0.1)
        ran = job(gradient=WHOLE, landmarks={"count": 6}, refine=0.1, min_fidelity=0.999)
        grown = [unit.result.get("grow") for unit in ran.done[Stage.PROPAGATE]]
        assert [round_ and round_["count"] for round_ in grown] == [12, 24, POOL, None]
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
        grown = [unit.result.get("grow") for unit in ran.done[Stage.PROPAGATE]]
        assert [round_ and round_["count"] for round_ in grown] == [12, POOL, None]

    def test_where_it_is_met_nothing_grows(self, job: Job) -> None:
        uniform = {"count": 30, "choice": "uniform"}
        easy = job(gradient=WHOLE, landmarks=uniform, refine=0.1)
        reached = easy.done[Stage.PROPAGATE][0].result["fidelity"]["mean_spearman"]
        assert reached > 0.05, "choose another seed: this one shows nothing"
        ran = job(gradient=WHOLE, landmarks=uniform, refine=0.1, min_fidelity=reached - 0.01)
        assert ran.keys(Stage.LANDMARK_GRADIENTS) == easy.keys(Stage.LANDMARK_GRADIENTS)
        assert ran.arrays["exact"].sum() < POOL
        assert any("is reached with 30 landmarks" in note for note in ran.summary["notes"])

    def test_beyond_the_most_landmarks_it_is_said(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("worker.stages.propagate.MAX_LANDMARKS", 10)
        ran = job(gradient=WHOLE, landmarks={"count": 8}, refine=0.1, min_fidelity=0.999, seed=5)
        assert ran.summary["landmark_count"] == 8
        assert any("is not reached with 8 landmarks" in note for note in ran.summary["notes"])
