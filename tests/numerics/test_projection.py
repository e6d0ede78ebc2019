"""The projection of gradients: same signs everywhere, unbiased, with the variance of theory (METHOD 9, point 6)."""

from itertools import product

import numpy as np
import pytest
import torch

from worker.influence import GradientProjection
from worker.influence.projection import plain_projection

SEEDS = 6000


def two_gradients(rows, columns, *, same):
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return G, G if same else G + torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def input_variance(G, H, q):
    """Variance of <G R, H R> / q over R (I, q) of independent signs: moments of R RT / q against X = GT H."""
    X = G.T @ H
    return ((X * X).sum() + (X * X.T).sum() - 2 * X.diagonal().square().sum()) / q


def fold_variance(G, H, dim):
    """Variance of the inner product of sums of entries with random signs, `dim` sums in turn."""
    place = torch.arange(G.numel()) % dim

    def sums(values):
        return torch.zeros(dim, dtype=G.dtype).index_add(0, place, values.flatten())

    return (sums(G**2) * sums(H**2) + sums(G * H) ** 2 - 2 * sums(G**2 * H**2)).sum()


def products(G, H, **options):
    found = torch.empty(SEEDS, dtype=torch.float64)
    for seed in range(SEEDS):
        layer = GradientProjection(seed=seed, **options).layer("layer", *G.shape, dtype=torch.float64)
        found[seed] = layer.apply(G) @ layer.apply(H)
    return found


def check(found, mean, variance):
    assert abs(found.mean() - mean) < 4 * (variance / SEEDS).sqrt()
    assert abs(found.var() / variance - 1) < 0.15


@pytest.mark.parametrize("same", [False, True])
def test_reduced_inputs_are_unbiased_with_the_variance_of_theory(same):
    G, H = two_gradients(7, 6, same=same)
    found = products(G, H, dim=21, directions=3)  # as many sums as entries: each has its own
    check(found, (G * H).sum(), input_variance(G, H, 3))


@pytest.mark.parametrize("same", [False, True])
def test_sums_are_unbiased_with_the_variance_of_theory(same):
    G, H = two_gradients(7, 6, same=same)
    check(products(G, H, dim=9, directions=6), (G * H).sum(), fold_variance(G, H, 9))


def test_both_together_have_the_variances_of_both():
    """Var = Var(E | R) + E(Var | R), the latter over every matrix of signs that there is."""
    G, H = two_gradients(5, 3, same=False)
    folds = []
    for signs in product((-1.0, 1.0), repeat=6):
        R = torch.tensor(signs, dtype=torch.float64).reshape(3, 2)
        folds.append(fold_variance(G @ R / 2**0.5, H @ R / 2**0.5, 4))
    variance = input_variance(G, H, 2) + torch.stack(folds).mean()
    check(products(G, H, dim=4, directions=2), (G * H).sum(), variance)


@pytest.mark.slow
def test_layers_that_share_their_sums_do_not_disturb_the_mean():
    G, H = two_gradients(7, 6, same=True)
    found = torch.empty(SEEDS, dtype=torch.float64)
    for seed in range(SEEDS):
        projection = GradientProjection(dim=16, seed=seed, directions=3)
        pair = [plain_projection({"first": one, "second": 3 * one}, projection) for one in (G, H)]
        found[seed] = pair[0] @ pair[1]
    exact = 10 * (G * H).sum()
    assert abs(found.mean() - exact) < 4 * found.std() / SEEDS**0.5
    assert found.std() < exact, "the sums of sixteen places say something of the product"


def test_shared_components_of_the_inputs_do_not_multiply_the_error():
    """What a few directions on the output side would do: here outputs are unlike each other, inputs nearly the same."""
    generator = torch.Generator().manual_seed(3)
    a, delta = torch.ones(600), torch.randn(2, 400, generator=generator)
    G, H = (torch.outer(each / each.norm(), a / a.norm()).double() for each in delta)
    errors = [
        float(layer.apply(G) @ layer.apply(H) - (G * H).sum())
        for layer in (GradientProjection(dim=1024, seed=s).layer("l", 400, 600, dtype=torch.float64) for s in range(60))
    ]
    assert np.std(errors) < 2 / 1024**0.5
    coarse = [float(((P.T @ G) * (P.T @ H)).sum() / 32 - (G * H).sum()) for P in _few_directions(400, 32)]
    assert np.std(coarse) > 3 * np.std(errors), "32 directions on either side are 1,024 values too"


def _few_directions(rows, columns):
    generator = torch.Generator().manual_seed(4)
    for _ in range(60):
        yield torch.randint(0, 2, (rows, columns), generator=generator).double() * 2 - 1


def test_outer_product_of_projected_inputs_is_the_projected_gradient():
    layer = GradientProjection(dim=20, directions=5).layer("layer", 11, 13, dtype=torch.float64)
    delta, a = torch.randn(2, 9, 11, dtype=torch.float64), torch.randn(2, 9, 13, dtype=torch.float64)
    torch.testing.assert_close(layer.fold(delta.mT @ layer.project_input(a)), layer.apply(delta.mT @ a))


@pytest.mark.parametrize("dim", [7, 64, 1000])
def test_every_entry_is_in_one_sum(dim):
    """Also where the entries do not fill the last turn, or are fewer than the sums."""
    G, _ = two_gradients(10, 12, same=True)
    projection = GradientProjection(dim=dim, seed=2, directions=12)
    layer = projection.layer("layer", 10, 12, dtype=torch.float64)
    torch.testing.assert_close(
        layer.apply(G),
        torch.zeros(dim, dtype=torch.float64).index_add_(
            0, (layer.first + torch.arange(120)) % dim, (G * layer.S_Oq).flatten()
        ),
    )
    assert layer.apply(G.expand(3, 10, 12)).shape == (3, dim)


def test_signs_depend_on_seed_and_name_only():
    def signs(name="layers.0", dim=90, seed=1):
        layer = GradientProjection(dim=dim, seed=seed, directions=8).layer(name, 50, 40)
        return layer.R_Iq, layer.S_Oq

    for P, S in (signs(), signs(dim=9)):
        assert torch.equal(P, signs()[0])
        assert torch.equal(S, signs()[1])
    for P, S in (signs(seed=2), signs(name="layers.1")):
        assert not torch.equal(P, signs()[0])
        assert not torch.equal(S, signs()[1])
    assert not torch.equal(signs()[0], signs()[1][:40]), "the two must be independent"
    assert set(signs()[1].unique().tolist()) == {-1.0, 1.0}


def test_signs_are_the_same_on_every_machine():
    """Pinned: workers of different versions or processors must not project differently."""
    layer = GradientProjection(dim=40, seed=7, directions=4).layer("model.layers.3.mlp.down_proj", 4, 8)
    packed = [np.packbits(signs.numpy().ravel() > 0).tolist() for signs in (layer.R_Iq, layer.S_Oq)]
    assert (packed, layer.first) == ([[255, 114, 122, 8], [214, 115]], 36)


def test_layers_of_no_more_weights_than_values_are_not_projected():
    assert not GradientProjection(dim=100).reduces([(5, 10), (10, 5)])
    assert GradientProjection(dim=99).reduces([(5, 10), (10, 5)])


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"directions": 0}])
def test_too_small_a_number_is_an_error(wrong):
    with pytest.raises(ValueError, match=f"projection {next(iter(wrong))} must be at least 1, not 0"):
        GradientProjection(**wrong)


def test_signs_survive_bfloat16():
    layer = GradientProjection(dim=30, directions=8).layer("layer", 64, 64)
    low = GradientProjection(dim=30, directions=8).layer("layer", 64, 64, dtype=torch.bfloat16)
    assert torch.equal(low.R_Iq.float(), layer.R_Iq)
    assert torch.equal(low.S_Oq.float(), layer.S_Oq)
