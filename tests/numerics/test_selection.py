"""Round robin, top k, and the closed form of the first-order weights (METHOD 9, point 4)."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from worker.influence import first_order_weights, mean_one_over_selected, round_robin, selection, top_k
from worker.influence.selection import plain_round_robin
from worker.influence.solver import plain_certificate


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [False, True])
def test_round_robin_equals_the_plain_one(seed, ties):
    generator = np.random.default_rng(seed)
    n, t = int(generator.integers(5, 120)), int(generator.integers(1, 9))
    P = generator.integers(0, 4, (n, t)).astype(np.float32) if ties else generator.standard_normal((n, t))
    eligible = generator.random(n) < 0.7
    for mask in (None, eligible):
        available = n if mask is None else int(mask.sum())
        for budget in {0, 1, available // 2, available}:
            actual = round_robin(P, budget, seed=seed, eligible=mask)
            assert actual.tolist() == plain_round_robin(P, budget, seed=seed, eligible=mask)
    assert torch.equal(
        torch.from_numpy(round_robin(torch.from_numpy(P), 3, seed=seed)), torch.from_numpy(round_robin(P, 3, seed=seed))
    )


def test_round_robin_order_comes_from_the_seed():
    P = np.eye(8)
    orders = {tuple(round_robin(P, 8, seed=seed)) for seed in range(20)}
    assert len(orders) > 10


def test_round_robin_of_a_million_samples_when_all_targets_want_the_same():
    """All targets alike is the worst case: each has to pass everything that the others took."""
    P = np.random.default_rng(0).standard_normal((1_000_000, 1)).astype(np.float32)
    chosen = round_robin(np.broadcast_to(P, (1_000_000, 50)), 5000, seed=0)
    assert chosen.tolist() == top_k(P[:, 0], 5000).tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alike", [False, True])
def test_round_robin_in_small_blocks_and_with_short_lists_is_the_same(seed, alike, monkeypatch, tmp_path):
    """Lists are filled block by block, and made again from what is left when one of them is used up."""
    generator = np.random.default_rng(seed)
    n, t = 150, int(generator.integers(1, 7))
    stored = np.lib.format.open_memmap(tmp_path / "P.npy", mode="w+", dtype=np.float32, shape=(n, t + 2))
    stored[:] = generator.integers(0, 30, (n, 1 if alike else t + 2))
    stored[:, t:] = np.nan  # columns behind those that count
    P, eligible = stored[:, :t], generator.random(n) < 0.8
    monkeypatch.setattr(selection, "_BLOCK_VALUES", 7 * t)
    monkeypatch.setattr(selection, "_RANKED_VALUES", 3 * t)
    available = int(eligible.sum())
    for budget in (1, 9, available // 2, available):
        actual = round_robin(P, budget, seed=seed, eligible=eligible)
        assert actual.tolist() == plain_round_robin(P, budget, seed=seed, eligible=eligible)


def test_round_robin_does_not_hold_the_influence(monkeypatch, tmp_path):
    n, t = 100_000, 64
    stored = np.lib.format.open_memmap(tmp_path / "P.npy", mode="w+", dtype=np.float32, shape=(n, t))
    stored[:] = np.random.default_rng(0).standard_normal((n, t))
    monkeypatch.setattr(selection, "_BLOCK_VALUES", 1 << 18)
    monkeypatch.setattr(selection, "_RANKED_VALUES", 1 << 18)
    P = np.load(tmp_path / "P.npy", mmap_mode="r")
    tracemalloc.start()
    chosen = round_robin(P, 5000, seed=0, eligible=np.ones(n, dtype=bool))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n * t * 4 / 2
    assert chosen.tolist() == round_robin(np.array(P), 5000, seed=0).tolist()


def test_top_k():
    p = np.array([1.0, 3.0, 3.0, -2.0, 5.0, 3.0])
    assert top_k(p, 4).tolist() == [4, 1, 2, 5]
    assert top_k(torch.from_numpy(p), 2, eligible=p < 4).tolist() == [1, 2]
    assert top_k(p, 0).tolist() == []
    assert top_k(np.zeros(5), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_influence_that_is_not_finite_is_named(value):
    P = np.zeros((6, 2))
    P[4, 1] = P[2, 0] = value
    for call in (
        lambda: round_robin(P, 2, seed=0),
        lambda: top_k(P.sum(1), 2),
        lambda: first_order_weights(P.sum(1), 2),
    ):
        with pytest.raises(ValueError, match=r"not finite for 2 samples, the first at \[2, 4\]"):
            call()
    fine = np.array([True, True, False, True, False, True])
    assert len(round_robin(P, 4, seed=0, eligible=fine)) == 4


def test_wrong_arguments_are_named():
    for budget in (-1, 4):
        with pytest.raises(ValueError, match="budget must be from 0 to the number of eligible samples, 3"):
            round_robin(np.zeros((3, 2)), budget, seed=0)
    with pytest.raises(ValueError, match="eligible must be a bool array"):
        top_k(np.zeros(3), 1, eligible=[0, 1, 2])
    with pytest.raises(ValueError, match="no targets"):
        round_robin(np.zeros((3, 0)), 1, seed=0)
    with pytest.raises(ValueError, match="P must have 2 dimensions"):
        round_robin(np.zeros(3), 1, seed=0)
    for k in (0, 4):
        with pytest.raises(ValueError, match="budget must be from 1"):
            first_order_weights(np.zeros(3), k)


def qp_solution(p, ridge, k):
    """General solver for argmin -p.w + (ridge/2) |w|^2 on w >= 0, sum w = n, in units of the mean positive weight n / k."""
    n = len(p)
    c = (p - p.max()) * k / (n * ridge)
    result = minimize(
        lambda u: -c @ u + 0.5 * u @ u,
        np.full(n, k / n),
        jac=lambda u: u - c,
        bounds=[(0, None)] * n,
        constraints={"type": "eq", "fun": lambda u: u.sum() - k, "jac": lambda _: np.ones(n)},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    assert result.status in (0, 8), "solved, or no further descent at this precision"
    return result.x * n / k


@pytest.mark.parametrize("n", [50, 120, 200])
@pytest.mark.parametrize("kind", ["normal", "negative", "skewed"])
def test_closed_form_solves_the_quadratic_programme(n, kind):
    p = np.random.default_rng(n).standard_normal(n)
    p = {"normal": p, "negative": p - 100, "skewed": np.exp(2 * p)}[kind]
    for k in (1, 7, n // 2, n - 1, n):
        solution = first_order_weights(torch.from_numpy(p), k)
        assert (solution.weights > 0).sum() == k
        assert set(np.flatnonzero(solution.weights)) == set(np.argsort(-p)[:k])
        found = plain_certificate(p, np.zeros((n, n)), solution.weights, ridge=solution.ridge, learning_rate=1.0)
        assert found[0] < 1e-8
        assert abs(solution.weights.mean() - 1) < 1e-8
        slopes = p - solution.ridge * solution.weights
        assert np.abs(slopes - solution.threshold)[solution.weights > 0].max() < 1e-8 * np.ptp(p)
        if n < 200:
            np.testing.assert_allclose(solution.weights, qp_solution(p, solution.ridge, k), atol=1e-5 * n / k)


def test_closed_form_is_that_of_the_paper():
    p = np.array([4.0, 1.0, 3.0, 0.5])
    solution = first_order_weights(p, 2)
    assert solution.threshold == 1.0
    assert solution.ridge == (3.0 + 2.0) / 4
    np.testing.assert_allclose(solution.weights, [4 * 3 / 5, 0, 4 * 2 / 5, 0])
    np.testing.assert_allclose(solution.weights, np.maximum(0, (p - solution.threshold) / solution.ridge))


def test_degenerate_problems():
    tied = first_order_weights(np.array([2.0, 1.0, 1.0, 1.0, 0.0]), 2)
    assert np.flatnonzero(tied.weights).tolist() == [0, 1], "of the tied, the lower index"
    assert tied.threshold == 0.0
    np.testing.assert_allclose(tied.weights, [10 / 3, 5 / 3, 0, 0, 0])

    lowest_tied = first_order_weights(np.array([3.0, 1.0, 1.0, 1.0]), 3)
    assert lowest_tied.threshold == 1.0 - (3.0 - 1.0) / 2
    assert np.flatnonzero(lowest_tied.weights).tolist() == [0, 1, 2]

    equal = first_order_weights(np.full(4, -7.0), 2)
    np.testing.assert_allclose(equal.weights, [2, 2, 0, 0])
    assert (equal.ridge, equal.threshold) == (0.0, -7.0)

    everything = first_order_weights(np.array([1.0, 2.0, 4.0]), 3)
    assert everything.threshold == 1.0 - 1.5
    assert (everything.weights > 0).all()
    assert everything.weights.sum() == pytest.approx(3)

    single = first_order_weights(np.array([-5.0]), 1)
    np.testing.assert_allclose(single.weights, [1.0])
    nearly_equal = first_order_weights(np.array([1.0, 1.0 + 1e-16, 1.0, np.nextafter(1.0, 2)]), 1)
    np.testing.assert_allclose(nearly_equal.weights, [0, 0, 0, 4])


def test_mean_one_over_selected():
    rescaled = mean_one_over_selected(np.array([0.0, 6.0, 0.0, 2.0]))
    np.testing.assert_allclose(rescaled, [0, 1.5, 0, 0.5])
    with pytest.raises(ValueError, match="nothing is selected"):
        mean_one_over_selected(np.zeros(3))
