"""The weighted solver against an independent interior-point solver and the conditions of optimality (METHOD 9, point 4)."""

import tracemalloc

import clarabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from worker.influence import first_order_weights, mean_one_over_selected, solver
from worker.influence.solver import plain_certificate, weighted_selection

KINDS = [
    *(
        "plain",
        "equal_p",
        "negative_p",
        "p_tiny",
        "p_huge",
        "p_in_span",
        "rate_tiny",
        "rate_huge",
        "budget_one",
        "budget_all",
    ),
    *("rank_deficient", "duplicates", "indefinite", "negative_form", "more_columns_than_samples", "float32"),
]


def problem(seed, kind):
    """p, B, M, learning rate and budget."""
    generator = np.random.default_rng(seed)
    n, r = int(generator.integers(50, 201)), int(generator.integers(1, 25))
    p, rate, budget = generator.standard_normal(n), 10 ** generator.uniform(-3, 0), int(generator.integers(1, n + 1))
    B, M = generator.standard_normal((n, r)), generator.standard_normal((r, r))
    M = M @ M.T / n
    match kind:
        case "equal_p":
            p = np.full(n, p[0])
        case "negative_p":
            p = -np.abs(p) - 10
        case "rank_deficient":
            B[:, r // 2 :] = B[:, :1]
        case "duplicates":
            half = n // 2
            p[half : 2 * half], B[half : 2 * half] = p[:half], B[:half]
        case "indefinite":
            M = generator.standard_normal((r, r)) / n
            M = M + M.T
        case "p_tiny":
            p, rate = p * 1e-20, rate * 1e-20
        case "p_huge":
            p, rate = p * 1e20, rate * 1e20
        case "rate_tiny":
            rate = 1e-12
        case "rate_huge":
            rate = 1e5
        case "budget_one":
            budget = 1
        case "budget_all":
            budget = n
        case "more_columns_than_samples":
            B = generator.standard_normal((n, n + 7))
            M = np.eye(n + 7) / n
        case "float32":
            B = B.astype(np.float32)
        case "p_in_span":
            p, M = B.mean(axis=1), np.eye(r) / n
        case "negative_form":
            M = -M
    return p, B, M, rate, budget


def clipped_form(B, M):
    """Q (n, n), its negative eigenvalues, and the sum of the absolute ones."""
    B = B.astype(np.float64)
    values, vectors = np.linalg.eigh(B @ M @ B.T)
    noise = 1e-12 * np.abs(values).max(initial=0)
    return (vectors * np.maximum(values, 0)) @ vectors.T, values[values < -noise], np.abs(values).sum()


def scale_of(p, Q, rate):
    return np.ptp(p) + rate * len(p) * Q.diagonal().max(initial=0) or 1.0


def reference(p, Q, rate, ridge, total, scale):
    """Weights of this sum by an interior-point method, in units in which slopes are of order one and the sum is 1.

    Such a method leaves the square root of its precision where a weight is only just 0: the last step solves the linear equations
    of the samples that it found positive.
    """
    n = len(p)
    H, c = rate * total / scale * Q + ridge * total / scale * np.eye(n), (p - p.max()) / scale
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-14
    solved = clarabel.DefaultSolver(
        sparse.csc_matrix(np.triu(H)),
        -c,
        sparse.csc_matrix(np.vstack([np.ones(n), -np.eye(n)])),
        np.r_[1.0, np.zeros(n)],
        [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(n)],
        settings,
    ).solve()
    positive = np.array(solved.x) > 1e-7 / n
    equations = np.block(
        [[H[np.ix_(positive, positive)], np.ones((positive.sum(), 1))], [np.ones(positive.sum()), 0.0]]
    )
    weights = np.zeros(n)
    weights[positive] = np.linalg.solve(equations, np.r_[c[positive], 1.0])[:-1] * total
    return weights


def check(p, B, M, rate, budget):
    """Asserts what must hold of a solution; returns it and the reference's weights at the same ridge."""
    n, (Q, negative, total) = len(p), clipped_form(B, M)
    solution = weighted_selection(p, budget=budget, factors=(B, M), learning_rate=rate)
    assert solution.converged
    weights, ridge, scale = solution.weights, solution.ridge, scale_of(p, Q, rate)
    assert (weights >= 0).all()
    assert abs(weights.sum() / n - 1) < 1e-12
    assert solution.support == (weights > 0).sum() == budget
    assert solution.clipped_eigenvalues == len(negative)
    assert solution.clipped_mass == pytest.approx(-negative.sum() / max(total, 1e-300), abs=1e-12)
    # Where samples were left out, the problem that was solved is that of the others; of the second order they are the support.
    inside = weights > 0 if solution.restricted else np.ones(n, dtype=bool)
    residual, value = plain_certificate(
        p[inside], Q[np.ix_(inside, inside)], weights[inside], ridge=ridge, learning_rate=rate
    )
    assert residual / scale < 1e-8
    assert solution.kkt_residual < 1e-8
    assert abs(residual / scale - solution.kkt_residual) < 1e-10
    assert 0 <= solution.duality_gap < 1e-14
    assert solution.objective / (n * scale) == pytest.approx(value / (n * scale), abs=1e-12)
    expected = np.zeros(n)
    expected[inside] = reference(p[inside], Q[np.ix_(inside, inside)], rate, ridge, n, scale)
    return solution, expected


@pytest.mark.parametrize("kind", KINDS)
def test_solver_agrees_with_an_interior_point_solver(kind):
    for seed in range(13):
        p, B, M, rate, budget = problem(seed, kind)
        solution, expected = check(p, B, M, rate, budget)
        np.testing.assert_allclose(solution.weights, expected, rtol=0, atol=1e-8 * len(p) / budget)


@pytest.mark.parametrize("budget", [1, 7, 40, 60])
@pytest.mark.parametrize("ties", [False, True])
def test_a_form_of_zero_gives_the_closed_form(budget, ties):
    generator = np.random.default_rng(budget)
    p = generator.integers(0, 5, 60).astype(float) if ties else generator.standard_normal(60)
    closed = first_order_weights(p, budget)
    zero = np.zeros((60, 3)), np.eye(3)
    for factors in (None, zero, (generator.standard_normal((60, 3)), np.zeros((3, 3)))):
        solution = weighted_selection(p, budget=budget, factors=factors, learning_rate=0.1)
        np.testing.assert_allclose(solution.weights, closed.weights, rtol=1e-12, atol=1e-12)
        assert solution.support == budget
        assert solution.kkt_residual < 1e-12
        assert 0 <= solution.duality_gap < 1e-15
        assert solution.ridge == pytest.approx(closed.ridge)
        assert solution.iterations == 0
        if not solution.restricted:
            assert solution.threshold == pytest.approx(closed.threshold)
    if not ties:
        tiny = generator.standard_normal((60, 3)), 1e-14 * np.eye(3)
        near = weighted_selection(p, budget=budget, factors=tiny, learning_rate=0.1)
        np.testing.assert_allclose(near.weights, closed.weights, atol=1e-7 * 60 / budget)


@settings(deadline=None)
@given(data=st.data())
def test_of_any_cosines_exactly_the_budget_is_positive_and_stays_so_in_float32(data):
    """Ties in every place; of tied samples the lower index. The weights are kept in float32, mean 1 over the selected."""
    n, t = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 4))
    coarse = data.draw(st.integers(0, 20))
    P = np.array(data.draw(st.lists(st.integers(-(2**coarse), 2**coarse), min_size=n * t, max_size=n * t))) / 2**coarse
    p, budget = P.reshape(n, t).astype(np.float32).mean(axis=1, dtype=np.float64), data.draw(st.integers(1, n))
    weights = weighted_selection(p, budget=budget, factors=None, learning_rate=1e-3).weights
    kept = mean_one_over_selected(weights).astype(np.float32)
    assert np.flatnonzero(kept > 0).tolist() == sorted(np.argsort(-p, kind="stable")[:budget].tolist())
    assert kept.sum() == pytest.approx(budget, rel=1e-5)


def test_a_search_that_is_cut_short_says_so(monkeypatch):
    p, B, M, rate, budget = problem(1, "plain")
    monkeypatch.setattr(solver, "MAX_STEPS", 1)
    solution = weighted_selection(p, budget=budget, factors=(B, M), learning_rate=rate)
    assert not solution.converged
    assert solution.kkt_residual > 1e-8, "the certificate is that of the last point"


def test_equal_p_without_a_form_gives_equal_weights_to_the_lower_indices():
    solution = weighted_selection(np.full(5, 3.0), budget=2, factors=None, learning_rate=1.0)
    np.testing.assert_allclose(solution.weights, [2.5, 2.5, 0, 0, 0])
    assert (solution.ridge, solution.restricted, solution.kkt_residual, solution.duality_gap) == (0, True, 0, 0)


def test_of_equal_samples_the_lower_index_is_kept():
    generator = np.random.default_rng(0)
    p, B = generator.standard_normal(40), generator.standard_normal((40, 4))
    single = weighted_selection(p, budget=9, factors=(B, np.eye(4) / 80), learning_rate=0.5)
    twice = weighted_selection(np.tile(p, 2), budget=9, factors=(np.tile(B, (2, 1)), np.eye(4) / 80), learning_rate=0.5)
    chosen = np.flatnonzero(twice.weights)
    assert single.support == twice.support == 9
    assert twice.restricted, "copies enter in pairs, so nine of them never do"
    assert all(index < 40 or index - 40 in chosen for index in chosen)
    assert not single.restricted


def dense_pool(seed=3, n=80, r=5, budget=20):
    generator = np.random.default_rng(seed)
    p, B, M, rate = generator.standard_normal(n), generator.standard_normal((n, r)), np.eye(r) / n, 0.3
    solution = weighted_selection(p, budget=budget, factors=(B, M), learning_rate=rate)
    pool, scale = solver._Pool.of(p, B, np.eye(r) * np.sqrt(rate / n * n))
    return generator, solution, pool, scale, p, B @ M @ B.T, rate


def test_certificate_of_perturbed_weights_is_honest():
    """The gap is primal less dual, bounds what is lost against the optimum, and grows with the perturbation."""
    generator, solution, pool, scale, p, Q, rate = dense_pool()
    n = len(p)
    best = plain_certificate(p, Q, solution.weights, ridge=solution.ridge, learning_rate=rate)[1]
    for _ in range(10):
        direction = generator.standard_normal(n)
        previous = solution.duality_gap
        for size in (1e-8, 1e-6, 1e-4, 1e-2, 1.0):
            weights = np.maximum(solution.weights + size * direction, 0)
            weights *= n / weights.sum()
            _, residual, gap, value = solver._certificate(pool, weights / n, solution.ridge * n / scale)
            assert residual > 100 * solution.kkt_residual
            assert gap > previous
            previous = gap
            actual = plain_certificate(p, Q, weights, ridge=solution.ridge, learning_rate=rate)[1]
            assert n * (scale * value - p.max()) == pytest.approx(actual, rel=1e-10)
            slopes = p - rate * Q @ weights
            lowest = reference(slopes, np.zeros((n, n)), 0.0, solution.ridge, n, scale)
            dual = -slopes @ lowest + solution.ridge / 2 * lowest @ lowest - rate / 2 * weights @ Q @ weights
            assert gap * n * scale == pytest.approx(actual - dual, rel=1e-3, abs=1e-11)
            assert actual - best <= gap * n * scale + 1e-12


def test_rows_are_read_in_blocks_and_never_copied_whole(monkeypatch, tmp_path):
    generator = np.random.default_rng(0)
    n, r = 60_000, 48
    B = np.lib.format.open_memmap(tmp_path / "B.npy", mode="w+", dtype=np.float32, shape=(n, r))
    B[:] = generator.standard_normal((n, r))
    p, M = generator.standard_normal(n), np.eye(r) / n
    arguments = {"budget": 3000, "factors": (np.load(tmp_path / "B.npy", mmap_mode="r"), M), "learning_rate": 1.0}
    whole = weighted_selection(p, **arguments)
    monkeypatch.setattr(solver, "_BLOCK_VALUES", 1 << 14)
    tracemalloc.start()
    blocked = weighted_selection(p, **arguments)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * n * 8 < n * r * 4, "vectors of n only"
    assert whole.support == blocked.support == 3000
    np.testing.assert_allclose(blocked.weights, whole.weights, rtol=1e-7, atol=1e-7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_small_problem_is_solved(data):
    n, r = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    number = st.integers(-3, 3).map(float) | st.floats(-5, 5, allow_subnormal=False)
    p = np.array(data.draw(st.lists(number, min_size=n, max_size=n)))
    B = np.array(data.draw(st.lists(number, min_size=n * r, max_size=n * r))).reshape(n, r)
    M = np.array(data.draw(st.lists(number, min_size=r * r, max_size=r * r))).reshape(r, r)
    rate = 10.0 ** data.draw(st.integers(-6, 4))
    budget = data.draw(st.integers(1, n))
    solution = weighted_selection(p, budget=budget, factors=(B, M + M.T), learning_rate=rate)
    assert solution.support == budget
    assert (solution.weights >= 0).all()
    assert solution.weights.sum() == pytest.approx(n)
    assert solution.kkt_residual < 1e-8
    assert 0 <= solution.duality_gap < 1e-12


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), shift=st.floats(-100, 100), factor=st.floats(1e-6, 1e6))
def test_weights_do_not_depend_on_the_unit_or_the_origin_of_p(seed, shift, factor):
    p, B, M, rate, budget = problem(seed, "plain")
    first = weighted_selection(p, budget=budget, factors=(B, M), learning_rate=rate)
    second = weighted_selection(factor * (p + shift), budget=budget, factors=(B, factor * M), learning_rate=rate)
    np.testing.assert_allclose(second.weights, first.weights, atol=1e-6 * len(p) / budget)
    assert second.ridge == pytest.approx(factor * first.ridge, rel=1e-6)


def test_wrong_arguments_are_named():
    p, B, M = np.zeros(4), np.ones((4, 2)), np.eye(2)

    def call(p=p, budget=2, factors=(B, M), learning_rate=1.0):
        return weighted_selection(p, budget=budget, factors=factors, learning_rate=learning_rate)

    for wrong in (np.array([0, np.nan, 1, 1]), np.array([0, np.inf, 1, 1]), np.zeros((2, 2)), np.empty(0)):
        with pytest.raises(ValueError, match="p must be finite"):
            call(p=wrong)
    for budget in (0, 5, -1):
        with pytest.raises(ValueError, match="budget must be from 1 to the number of samples, 4"):
            call(budget=budget)
    for rate in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="learning_rate must be positive and finite"):
            call(learning_rate=rate)
    for factors in ((B[:3], M), (B, np.eye(3)), (B[0], M), (B, M[0])):
        with pytest.raises(ValueError, match=r"factors must be B \(n, r\) and M \(r, r\) with n = 4"):
            call(factors=factors)
    with pytest.raises(ValueError, match="M of the factors is not symmetric"):
        call(factors=(B, np.array([[1.0, 0.1], [0.0, 1.0]])))
    with pytest.raises(ValueError, match="M of the factors is not finite"):
        call(factors=(B, M * np.nan))
    B_wrong = B.copy()
    B_wrong[2, 1] = np.inf
    with pytest.raises(ValueError, match="B of the factors is not finite, first in row 2"):
        call(factors=(B_wrong, M))
    with pytest.raises(ValueError, match="too large for float64"):
        call(p=np.array([-1e308, 1e308, 0, 0]))
