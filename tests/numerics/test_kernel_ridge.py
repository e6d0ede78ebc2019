"""Cosine influence, kernel ridge regression, leave-one-out and fidelity (METHOD 9, point 5)."""

import numpy as np
import pytest
import torch
from scipy import stats

from worker.influence import KernelRidge, cosine_influence, fidelity
from worker.influence.kernel_ridge import RIDGES, ROWS, _spanned, plain_kernel_ridge, plain_leave_one_out, plain_spanned
from worker.influence.kernels import kernel_matrix, plain_kernel


def problem(n=60, e=16, t=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    E = torch.nn.functional.normalize(torch.randn(n, e, generator=generator, dtype=torch.float64), dim=1)
    return E, torch.tanh(E @ torch.randn(e, t, generator=generator, dtype=torch.float64) * 2)


def test_cosine_influence():
    generator = torch.Generator().manual_seed(0)
    G, T = torch.randn(9, 5, generator=generator), torch.randn(4, 5, generator=generator)
    G[3] = 0
    T[2] = 0
    plain, cosine = cosine_influence(G, T, normalize=False), cosine_influence(G, T)
    assert cosine.dtype == torch.float32
    for i in range(9):
        for j in range(4):
            expected = float(sum(G[i, c].double() * T[j, c].double() for c in range(5)))
            assert plain[i, j] == pytest.approx(expected, abs=1e-6)
            scale = float(G[i].double().norm() * T[j].double().norm())
            assert cosine[i, j] == pytest.approx(expected / scale if scale else 0.0, abs=1e-6)
    tiny = cosine_influence(G * 1e-25, T * 1e-25)
    torch.testing.assert_close(tiny, cosine)
    with pytest.raises(ValueError, match=r"\(9, 5\) and \(4, 4\)"):
        cosine_influence(G, T[:, :4])


KERNELS = ["rbf", "laplacian", "linear"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_equals_its_formula(kernel):
    E, _ = problem()
    sigma = None if kernel == "linear" else 0.7
    torch.testing.assert_close(
        kernel_matrix(kernel, E[:5], E[5:], sigma), plain_kernel(kernel, E[:5], E[5:], sigma), rtol=1e-12, atol=1e-14
    )
    if kernel == "laplacian":
        assert float(kernel_matrix(kernel, E[:1], E[1:2], sigma)) == pytest.approx(
            np.exp(-np.sqrt(float((E[0] - E[1]).square().sum())) / 0.7)
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_prediction_equals_the_formula(kernel):
    E, P = problem()
    fitted = KernelRidge.fit(E[:40], P[:40], kernel=kernel, ridge=0.05)
    assert (fitted.kernel, fitted.ridge) == (kernel, 0.05)
    if kernel != "linear":
        pairs = [float((E[i] - E[j]).norm()) for i in range(40) for j in range(i)]
        assert fitted.sigma == pytest.approx(float(np.median(pairs)))
        assert fitted.delta == pytest.approx(0.05)
    else:
        assert fitted.sigma is None
        assert fitted.delta == pytest.approx(0.05 * float(E[:40].square().sum(1).mean()))
    expected = plain_kernel_ridge(E, E[:40], P[:40], kernel=kernel, sigma=fitted.sigma, delta=fitted.delta)
    torch.testing.assert_close(fitted.predict(E), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fitted.predict(E[50:51]), fitted.predict(E)[50:51])


def test_all_landmarks_and_no_ridge_give_exact_influence():
    E, P = problem()
    for ridge in (1e-12, 0.0):
        fitted = KernelRidge.fit(E, P, ridge=ridge, bandwidth=0.5)
        torch.testing.assert_close(fitted.predict(E), P, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_leave_one_out_by_formula_equals_refitting(kernel):
    E, P = problem(n=25)
    fitted = KernelRidge.fit(E, P, kernel=kernel, ridge=0.02)
    expected = plain_leave_one_out(E, P, kernel=kernel, sigma=fitted.sigma, delta=fitted.delta)
    torch.testing.assert_close(fitted.leave_one_out(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_fit_spanned_by_some_landmarks_equals_the_normal_equations(kernel, monkeypatch):
    monkeypatch.setattr("worker.influence.kernel_ridge.ROWS", 7)  # the last block is another
    E, P = problem(n=50, e=12)
    fitted = KernelRidge.fit(E, P, kernel=kernel, ridge=0.05, centres=9)
    assert fitted.centres.tolist() == [0, 5, 11, 16, 22, 27, 33, 38, 44]
    assert torch.equal(fitted.E_ze, E[fitted.centres])
    how = {"kernel": kernel, "sigma": fitted.sigma, "delta": fitted.delta}
    new = problem(n=20, e=12, seed=3)[0]
    expected = plain_spanned(new, E, P, fitted.E_ze, **how)
    torch.testing.assert_close(fitted.predict(new), expected, rtol=1e-6, atol=1e-7)
    own = kernel_matrix(kernel, new, fitted.E_ze, fitted.sigma)
    torch.testing.assert_close(own @ fitted.coefficients_zt, fitted.predict(new))  # contributions add up
    left_out = [
        plain_spanned(E[i : i + 1], E[torch.arange(50) != i], P[torch.arange(50) != i], fitted.E_ze, **how)
        for i in range(50)
    ]
    torch.testing.assert_close(fitted.leave_one_out(), torch.cat(left_out), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kernel", ["rbf", "laplacian"])
def test_a_fit_that_all_landmarks_span_is_the_plain_one(kernel):
    E, P = problem(n=ROWS + 30, t=1)
    plain = KernelRidge.fit(E, P, kernel=kernel, ridge=0.1)
    for count in (ROWS + 30, ROWS + 31):
        same = KernelRidge.fit(E, P, kernel=kernel, ridge=0.1, centres=count)
        assert torch.equal(same.coefficients_zt, plain.coefficients_zt)
        assert torch.equal(same.leave_one_out(), plain.leave_one_out())
    spanned = _spanned(E, P, kernel, 0.1, None, ROWS + 30)
    torch.testing.assert_close(spanned.coefficients_zt, plain.coefficients_zt, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(spanned.leave_one_out(), plain.leave_one_out(), rtol=1e-6, atol=1e-7)


def test_the_kernel_and_the_ridge_are_chosen_together():
    """Of a function that has the Laplacian kernel as its covariance, and of a smooth one."""
    E, smooth = problem(n=80, e=3)
    factor = torch.linalg.cholesky(plain_kernel("laplacian", E, E, 1.0))
    rough = factor @ torch.randn(80, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for P, best in ((rough, "laplacian"), (smooth, "rbf")):
        chosen = KernelRidge.fit(E, P, kernel="auto", ridge=None)
        fits = [
            KernelRidge.fit(E, P, kernel=kernel, ridge=ridge) for kernel in ("rbf", "laplacian") for ridge in RIDGES
        ]
        errors = [float(((P - one.leave_one_out()).square().mean(0) / P.var(0, correction=0)).sum()) for one in fits]
        least = fits[int(np.argmin(errors))]
        assert (chosen.kernel, chosen.ridge) == (least.kernel, least.ridge)
        assert torch.equal(chosen.coefficients_zt, least.coefficients_zt)
        assert chosen.kernel == best


@pytest.mark.parametrize("centres", [None, 20])
def test_they_are_chosen_on_some_landmarks_and_fitted_to_all(centres, monkeypatch):
    E, P = problem(n=80, e=3)
    monkeypatch.setattr("worker.influence.kernel_ridge.CHOSEN_ON", 40)
    some = KernelRidge.fit(E[::2], P[::2], kernel="auto", ridge=None)
    chosen = KernelRidge.fit(E, P, kernel="auto", ridge=None, centres=centres)
    expected = KernelRidge.fit(E, P, kernel=some.kernel, ridge=some.ridge, centres=centres)
    assert (chosen.kernel, chosen.ridge) == (some.kernel, some.ridge)
    assert torch.equal(chosen.coefficients_zt, expected.coefficients_zt)
    assert len(chosen.centres) == (centres or 80)


def test_centres_that_coincide():
    E, P = problem(n=20)
    E2, P2 = torch.cat([E, E, E]), torch.cat([P, P, P])
    thrice, once = (KernelRidge.fit(E2, P2, centres=count, ridge=0.1) for count in (30, 10))  # every other one of E
    assert sorted((once.centres % 20).tolist()) == sorted(set((thrice.centres % 20).tolist()))
    torch.testing.assert_close(thrice.predict(E), once.predict(E), rtol=0, atol=1e-5)
    torch.testing.assert_close(thrice.leave_one_out(), once.leave_one_out(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_a_ridge_not_given_is_the_one_that_predicts_left_out_landmarks_best(kernel, noise):
    E, P = problem(n=80)
    P += noise * P.std() * torch.randn(P.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    P = torch.cat([P * torch.tensor([1, 1e6, 1e-6]), torch.full((80, 1), 0.1)], 1)  # scales and constants do not matter
    chosen = KernelRidge.fit(E, P, kernel=kernel, ridge=None)
    fits = {ridge: KernelRidge.fit(E, P, kernel=kernel, ridge=ridge) for ridge in RIDGES}
    score = {ridge: sum(fidelity(P, one.leave_one_out()).r2[:3]) for ridge, one in fits.items()}
    best = fits[max(score, key=score.get)]
    assert chosen.delta == best.delta
    assert torch.equal(chosen.coefficients_zt, best.coefficients_zt)
    assert noise < 3 or chosen.delta == pytest.approx(RIDGES[-1])


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_columns_that_are_no_targets_do_not_choose_the_ridge(kernel):
    """Products with curvature are noise to the embedding and more than the targets: they would choose the largest ridge."""
    E, P = problem(n=80)
    noise = torch.randn(80, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone = KernelRidge.fit(E, P, kernel=kernel, ridge=None)
    carried = KernelRidge.fit(E, torch.cat([P, noise], 1), kernel=kernel, ridge=None, targets=P.shape[1])
    assert carried.delta == alone.delta < KernelRidge.fit(E, torch.cat([P, noise], 1), kernel=kernel, ridge=None).delta
    torch.testing.assert_close(carried.predict(E)[:, : P.shape[1]], alone.predict(E), rtol=1e-12, atol=1e-12)


def test_more_rows_than_a_piece():
    E, P = problem(n=30)
    fitted = KernelRidge.fit(E, P)
    many = E.repeat(300, 1)
    torch.testing.assert_close(fitted.predict(many), fitted.predict(E).repeat(300, 1))


def test_stored_half_precision_is_converted_a_piece_at_a_time():
    E, P = problem(n=30)
    fitted = KernelRidge.fit(E, P)
    half = E.repeat(100, 1).half()
    assert torch.equal(fitted.predict(half), fitted.predict(half.double()))


def test_duplicates_need_a_ridge():
    E, P = problem(n=20)
    E2, P2 = torch.cat([E, E[:5]]), torch.cat([P, P[:5]])
    assert torch.isfinite(KernelRidge.fit(E2, P2).predict(E)).all()
    for kernel in ("rbf", "linear"):
        with pytest.raises(ValueError, match=r"singular with ridge=0.*raise ridge"):
            KernelRidge.fit(E2, P2, kernel=kernel, ridge=0.0)
    same = torch.ones(6, 4)
    fitted = KernelRidge.fit(same, torch.arange(6.0)[:, None])
    assert fitted.sigma == 1.0
    assert torch.isfinite(fitted.leave_one_out()).all()


def test_one_landmark_and_float32_input():
    fitted = KernelRidge.fit(torch.ones(1, 3), torch.full((1, 2), 4.0), ridge=1.0)
    torch.testing.assert_close(fitted.predict(torch.ones(2, 3)), torch.full((2, 2), 2.0, dtype=torch.float64))
    torch.testing.assert_close(fitted.leave_one_out(), torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "cosine"}, "kernel"),
        ({"ridge": -1.0}, "ridge"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"centres": 0}, "centres must be at least 1"),
        ({"E_le": torch.zeros(3, 2)}, "landmarks must have"),
        (
            {"P_lt": torch.full((4, 2), torch.nan)},
            r"influence of 4 landmarks is not finite, the first at \[0, 1, 2, 3\]",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        KernelRidge.fit(**{"E_le": torch.eye(4)[:, :2], "P_lt": torch.zeros(4, 2), **change})


def test_fidelity_against_scipy():
    generator = torch.Generator().manual_seed(3)
    exact = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    loo = exact + torch.randn(50, 4, generator=generator, dtype=torch.float64)
    exact[:, 0] = exact[:, 0].round()  # ties
    result = fidelity(exact, loo)
    for j in range(4):
        a, b = exact[:, j].numpy(), loo[:, j].numpy()
        assert result.spearman[j] == pytest.approx(stats.spearmanr(a, b).statistic)
        assert result.r2[j] == pytest.approx(1 - ((a - b) ** 2).sum() / ((a - a.mean()) ** 2).sum())
    a, b = exact.mean(1).numpy(), loo.mean(1).numpy()
    assert result.mean_spearman == pytest.approx(stats.spearmanr(a, b).statistic)
    assert result.mean_r2 == pytest.approx(1 - ((a - b) ** 2).sum() / ((a - a.mean()) ** 2).sum())


def test_fidelity_of_constant_columns_is_none():
    varied = torch.arange(6.0)[:, None]
    constant = torch.full((6, 1), 0.1)
    result = fidelity(torch.cat([constant, varied, varied], 1), torch.cat([varied, constant, varied], 1))
    assert result.r2[0] is None
    assert result.r2[1] is not None
    assert result.r2[2] == 1.0
    assert result.spearman == (None, None, pytest.approx(1.0))
    empty = fidelity(torch.zeros(0, 2), torch.zeros(0, 2))
    assert empty.r2 == (None, None)
    assert empty.mean_spearman is None
    assert fidelity(torch.zeros(3, 0), torch.zeros(3, 0)).mean_r2 is None
