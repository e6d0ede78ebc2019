"""The promise: what residuals it draws, what it counts, and how it compares with the truth where that is known."""

from pathlib import Path

import numpy as np
import pytest

from worker.influence import promise as promised
from worker.influence.promise import Residuals, turns_gain
from worker.influence.selection import plain_round_robin

N, T, BUDGET = 400, 6, 30


def world(seed: int) -> tuple[np.ndarray, np.ndarray, Residuals]:
    """Truth, predictions and residuals, whose size grows with the prediction, and which targets share."""
    draw = np.random.default_rng(seed)
    predicted = 0.1 * (draw.normal(size=(N, T)) + draw.normal(size=(N, 1)))
    size = 0.02 + 0.2 * np.maximum(predicted, 0)
    truth = predicted + size * (draw.normal(size=(N, T)) + draw.normal(size=(N, 1))) / np.sqrt(2)
    # Those that residuals are taken from stand for any others: they are drawn from the same world.
    return truth.astype(np.float32), predicted.astype(np.float32), Residuals.of(truth[:150], predicted[:150].copy())


def best_refined(predicted: np.ndarray, count: int) -> np.ndarray:
    refined = np.zeros(N, dtype=bool)
    refined[np.argsort(-predicted.mean(axis=1))[:count]] = True
    return refined


def ask(P: np.ndarray, residuals: Residuals, refined: np.ndarray, folder: Path, **given: object) -> float | None:
    options = {"unknown": ~refined, "budget": BUDGET, "by_turns": True, "seed": 3, "folder": folder, **given}
    return promised(P, residuals, refined=refined, **options)


def captured(truth: np.ndarray, refined: np.ndarray, *, by_turns: bool) -> float:
    """The true share, with plain loops."""
    mean = truth.mean(axis=0)

    def gain(eligible: np.ndarray) -> float:
        if not by_turns:
            return float(np.sort(truth.mean(axis=1)[eligible] - mean.mean())[-BUDGET:].sum())
        order = np.random.Generator(np.random.Philox(3)).permutation(T)
        picks = plain_round_robin(truth, BUDGET, seed=3, eligible=eligible)
        return sum(float(truth[i, order[k % T]] - mean[order[k % T]]) for k, i in enumerate(picks))

    return gain(refined) / gain(np.ones(N, dtype=bool))


@pytest.mark.parametrize("by_turns", [True, False])
@pytest.mark.parametrize("count", [30, 60, 120])
def test_it_is_what_the_selection_really_captures(tmp_path: Path, by_turns: bool, count: int) -> None:
    errors = []
    for seed in range(12):
        truth, predicted, residuals = world(seed)
        refined = best_refined(predicted, count)
        P = np.where(refined[:, None], truth, predicted)
        found = ask(P, residuals, refined, tmp_path, by_turns=by_turns)
        assert found is not None
        errors.append(found - captured(truth, refined, by_turns=by_turns))
    assert abs(np.mean(errors)) < 0.03
    assert np.sqrt(np.mean(np.square(errors))) < 0.08


def test_the_more_is_exact_the_more_is_promised_up_to_all(tmp_path: Path) -> None:
    truth, predicted, residuals = world(1)
    found = []
    for count in (30, 60, 120, N):
        refined = best_refined(predicted, count)
        found.append(ask(np.where(refined[:, None], truth, predicted), residuals, refined, tmp_path))
    assert found == sorted(found)
    assert found[-1] == pytest.approx(1)
    assert not list(tmp_path.iterdir()), "scratch files were left"


def test_what_is_neither_refined_nor_unknown_does_not_count(tmp_path: Path) -> None:
    truth, predicted, residuals = world(2)
    refined = best_refined(predicted, 60)
    P = np.where(refined[:, None], truth, predicted)
    left_out = np.flatnonzero(~refined)[:20]
    unknown = ~refined
    unknown[left_out] = False
    without = ask(P, residuals, refined, tmp_path, unknown=unknown)
    P[left_out] = 9.0  # a landmark of whatever influence
    assert ask(P, residuals, refined, tmp_path, unknown=unknown) == without


def test_the_same_seed_promises_the_same(tmp_path: Path) -> None:
    truth, predicted, residuals = world(4)
    refined = best_refined(predicted, 60)
    P = np.where(refined[:, None], truth, predicted)
    assert ask(P, residuals, refined, tmp_path) == ask(P, residuals, refined, tmp_path)
    assert ask(P, residuals, refined, tmp_path) != ask(P, residuals, refined, tmp_path, seed=5)


@pytest.mark.parametrize("rounding", [0.0, 1e-7, 1e-5])
def test_where_nothing_can_be_gained_nothing_is_promised(rounding: float, tmp_path: Path) -> None:
    draw = np.random.default_rng(6)
    same = (0.25 + rounding * draw.normal(size=(N, T))).astype(np.float32)
    residuals = Residuals.of(same[:20].astype(np.float64), np.full((20, T), 0.25))
    assert ask(same, residuals, best_refined(same, 60), tmp_path) is None


def test_residuals_are_as_large_as_they_are_at_such_predictions() -> None:
    _, predicted, residuals = world(6)
    low, high = np.quantile(predicted, [0.05, 0.97])
    sizes = [float(residuals.size_at(np.full((1, T), value)).mean()) for value in (low, high)]
    assert sizes[1] > 1.5 * sizes[0]
    assert np.square(residuals.R_lt).mean() == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize(("rows", "targets"), [(2, 1), (3, 2), (9, 1)])
def test_a_few_residuals_give_a_finite_size(rows: int, targets: int) -> None:
    draw = np.random.default_rng(0)
    truth, left_out = draw.normal(size=(rows, targets)), draw.normal(size=(rows, targets))
    residuals = Residuals.of(truth, left_out)
    assert np.isfinite(residuals.R_lt).all()
    assert (residuals.size_at(draw.normal(size=(50, targets))) > 0).all()


def test_the_gain_of_turns_is_on_the_target_whose_turn_it_was() -> None:
    P = np.eye(3, dtype=np.float32)
    order = np.random.Generator(np.random.Philox(7)).permutation(3)
    assert turns_gain(P, order, 7, np.zeros(3)) == 3
    assert turns_gain(P, np.roll(order, 1), 7, np.zeros(3)) == 0
    assert turns_gain(P, order, 7, np.full(3, 0.5)) == 1.5
