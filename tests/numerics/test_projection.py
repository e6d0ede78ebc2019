"""The factored projection: same matrices everywhere, unbiased, with the variance of theory (METHOD 9, point 6)."""

import numpy as np
import pytest
import torch

from worker.influence import FactoredProjection
from worker.influence.projection import LayerProjection


def second_moment(X, Y, k):
    """E[<A, X><A, Y>] for A = R RT / k, R (d, k) of independent signs."""
    covariance = (X * Y).sum() + (X * Y.T).sum() - 2 * (X.diagonal() * Y.diagonal()).sum()
    return X.trace() * Y.trace() + covariance / k


def variance_of_inner_product(G, H, p, q):
    """Variance of <P(G), P(H)> = <A_out, G A_in HT>, by taking the moments of A_out, then those of A_in.

    With M = G B HT, the first gives tr(M)^2 + (sum_ij M_ij^2 + M_ij M_ji - 2 sum_i M_ii^2) / p, each a moment of B.
    """
    trace = second_moment(G.T @ H, G.T @ H, q)
    total = trace
    for i in range(len(G)):
        for j in range(len(G)):
            ij, ji = torch.outer(G[i], H[j]), torch.outer(G[j], H[i])
            total = total + (second_moment(ij, ij, q) + second_moment(ij, ji, q)) / p
            if i == j:
                total = total - 2 * second_moment(ij, ij, q) / p
    return total - (G * H).sum() ** 2


@pytest.mark.parametrize("same", [False, True])
def test_unbiased_with_the_variance_of_theory(same):
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    H = G if same else G + torch.randn(7, 6, generator=generator, dtype=torch.float64)
    seeds = 6000
    products = torch.empty(seeds, dtype=torch.float64)
    for seed in range(seeds):
        factors = FactoredProjection(dim=9, seed=seed).layer("layer", 1, 7, 6, dtype=torch.float64)
        products[seed] = (factors.apply(G) * factors.apply(H)).sum()
    variance = variance_of_inner_product(G, H, 3, 3)
    assert abs(products.mean() - (G * H).sum()) < 4 * (variance / seeds).sqrt()
    assert abs(products.var() / variance - 1) < 0.15


def test_a_side_that_is_not_reduced_is_kept_exactly():
    factors = FactoredProjection(dim=64).layer("layer", 1, 5, 30, dtype=torch.float64)
    assert factors.P_Op is None
    assert factors.P_Iq.shape == (30, 8)
    G = torch.randn(5, 30, dtype=torch.float64)
    torch.testing.assert_close(factors.apply(G), G @ factors.P_Iq / 8**0.5)


def test_outer_product_of_projected_factors_is_the_projected_gradient():
    factors = FactoredProjection(dim=20).layer("layer", 1, 11, 13, dtype=torch.float64)
    delta, a = torch.randn(2, 9, 11, dtype=torch.float64), torch.randn(2, 9, 13, dtype=torch.float64)
    early = factors.project_output(delta).mT @ factors.project_input(a) * factors.scale
    torch.testing.assert_close(early, factors.apply(delta.mT @ a))


def test_matrices_depend_on_seed_and_name_only():
    base = FactoredProjection(dim=90, seed=1).layer("layers.0", 10, 50, 40)
    for other in (
        FactoredProjection(dim=90, seed=1).layer("layers.0", 10, 50, 40),
        FactoredProjection(dim=9, seed=1).layer("layers.0", 1, 50, 40),
    ):
        assert torch.equal(base.P_Op, other.P_Op)
        assert torch.equal(base.P_Iq, other.P_Iq)
    for other in (
        FactoredProjection(dim=90, seed=2).layer("layers.0", 10, 50, 40),
        FactoredProjection(dim=90, seed=1).layer("layers.1", 10, 50, 40),
    ):
        assert not torch.equal(base.P_Op, other.P_Op)
        assert not torch.equal(base.P_Iq, other.P_Iq)
    assert not torch.equal(base.P_Op[:40], base.P_Iq), "the two sides must be independent"
    assert set(base.P_Op.unique().tolist()) == {-1.0, 1.0}


def test_matrices_are_the_same_on_every_machine():
    """Pinned: workers of different versions or processors must not project differently."""
    factors = FactoredProjection(dim=4, seed=7).layer("model.layers.3.mlp.down_proj", 1, 8, 8)
    packed = [np.packbits(P.numpy().ravel() > 0).tolist() for P in (factors.P_Op, factors.P_Iq)]
    assert packed == [[100, 142], [255, 114]]


def test_total_is_bounded_and_too_small_a_dim_is_an_error():
    for layers in (1, 3, 30, 80):
        p, q = FactoredProjection().size(layers, 4096, 11008)
        assert p == q
        assert layers * p * q <= 8192 < layers * (p + 1) * (q + 1)
    with pytest.raises(ValueError, match=r"dim 5 .* 6 layers"):
        FactoredProjection(dim=5).size(6, 10, 10)


def test_signs_survive_bfloat16():
    factors = FactoredProjection(dim=30).layer("layer", 1, 64, 64)
    low = FactoredProjection(dim=30).layer("layer", 1, 64, 64, dtype=torch.bfloat16)
    assert torch.equal(low.P_Op.float(), factors.P_Op)
    assert low.scale == factors.scale == pytest.approx(1 / 5)
    assert isinstance(low, LayerProjection)
