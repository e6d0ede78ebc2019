"""Curvature products, low-rank directions and the factors of Q (METHOD 1; METHOD 9, point 3) against torch.func."""

import pytest
import torch
from support.numerics_reference import EXACT, MIXED, build, ragged, random_state, relative_error, with_adapters
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from worker.influence import (
    GradientProjection,
    OptimizerOptions,
    curvature_products,
    directional_derivatives,
    gradient_scaling,
    low_rank,
    offset_influence,
    per_sample_gradients,
    quadratic_factors,
    second_order_terms,
    weighted_gradients,
)
from worker.influence.causal_lm import layer_size, linear_layers
from worker.influence.hessian_vector_products import plain_curvature_products
from worker.influence.projection import plain_projection

FAMILIES_WITH_FLOAT32_INSIDE = ("llama", "qwen2", "gemma2")
FLOAT32_INTERNALS = 1e-5


@pytest.fixture(autouse=True)
def _math_attention():
    with sdpa_kernel(SDPBackend.MATH):  # the references need second derivatives too
        yield


def random_directions(model, count, modules="down_proj"):
    """Directions (c, O, I) by layer name."""
    generator = torch.Generator().manual_seed(0)
    sizes = {name: layer_size(layer) for name, layer in linear_layers(model, modules).items()}
    return {name: torch.randn(count, *size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


def flat(layers):
    """(c, O, I) by layer name -> (c, d)."""
    return torch.cat([value.flatten(1) for value in layers.values()], dim=1)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("family", [*EXACT, *FAMILIES_WITH_FLOAT32_INSIDE])
def test_products_equal_those_of_one_target_and_direction_at_a_time(family, kind):
    model, samples = build(family), ragged(*MIXED)
    directions = random_directions(model, 2)
    expected = flat(plain_curvature_products(model, samples, directions, kind=kind))
    for token_budget in (1, 23, 10_000) if family in EXACT else (23,):
        result = flat(curvature_products(model, samples, directions, kind=kind, token_budget=token_budget))
        for j in range(2):
            assert relative_error(result[j], expected[j]) < (1e-10 if family in EXACT else FLOAT32_INTERNALS)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_products_are_those_of_the_explicit_matrix(kind):
    """Of torch.func: the Hessian of the mean loss, and J_zᵀ C J_z of the logits z by their Jacobian."""
    model = build("llama_float64", hidden_size=8, intermediate_size=6, num_hidden_layers=2)
    samples = ragged("..rrr", "...r", ".rr..rr")
    values = {
        f"model.{name}.weight": layer.weight.detach() for name, layer in linear_layers(model, "down_proj").items()
    }
    sizes = [value.numel() for value in values.values()]
    parts = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, dim=1)
    names = zip(linear_layers(model, "down_proj"), parts, values.values(), strict=True)
    ours = flat(curvature_products(model, samples, {n: part.reshape(-1, *v.shape) for n, part, v in names}, kind=kind))

    def logits(weights_d, i):
        """Of the response tokens, and these tokens; none is the first."""
        cut = {name: part.view_as(v) for (name, v), part in zip(values.items(), weights_d.split(sizes), strict=True)}
        ids, marked = (
            torch.from_numpy(x.copy()) for x in (samples.slice(i, i + 1).input_ids, samples.slice(i, i + 1).response)
        )
        return functional_call(model, cut, (ids[None].long(),)).logits[0, :-1][marked[1:]], ids[marked].long()

    weights_d, expected = torch.cat([value.flatten() for value in values.values()]), 0.0
    for i in range(3):
        if kind == "hessian":
            expected += torch.func.hessian(lambda w, i=i: nn.functional.cross_entropy(*logits(w, i)))(weights_d) / 3
            continue
        z_RV = logits(weights_d, i)[0].detach()
        jacobian = torch.func.jacrev(lambda w, i=i: logits(w, i)[0])(weights_d)
        for p_V, J_Vd in zip(z_RV.softmax(-1), jacobian, strict=True):
            expected += J_Vd.T @ (torch.diag(p_V) - torch.outer(p_V, p_V)) @ J_Vd / len(z_RV) / 3
    assert relative_error(ours, expected.detach()) < 1e-10


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_adapters_over_a_base_that_takes_no_gradient(kind):
    """Second derivatives in LoRA's A and B, which are multiplied with one another."""
    model, samples = with_adapters(build("gpt2")), ragged("..rrr", "...r", "", ".r.rr")
    directions = random_directions(model, 1, "lora")
    result = curvature_products(model, samples, directions, kind=kind, modules="lora", token_budget=8)
    model.eval()
    expected = plain_curvature_products(model, samples, directions, kind=kind, modules="lora")
    assert relative_error(flat(result), flat(expected)) < 1e-10


def test_running_out_of_memory_adds_nothing_twice():
    model, samples = build("gpt2"), ragged(*MIXED)
    directions = random_directions(model, 2)
    expected = curvature_products(model, samples, directions, kind="hessian", token_budget=1000)
    head, calls = model.lm_head, []

    def scarce(*_):
        calls.append(None)
        if len(calls) == 5:  # in the middle of the directions of a batch
            raise torch.OutOfMemoryError("scarce")

    handle = head.register_forward_pre_hook(scarce)
    result = curvature_products(model, samples, directions, kind="hessian", token_budget=40)
    handle.remove()
    assert relative_error(flat(result), flat(expected)) < 1e-12


def test_low_rank_directions_are_made_of_the_gradients():
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(m, 20, generator=generator, dtype=torch.float64)).Q for m in (60, 90))
    G_lk = left * 0.5 ** torch.arange(20) @ right.T
    U_lr, V_rk = low_rank(G_lk, 6)
    assert V_rk.shape == (6, 90)
    torch.testing.assert_close(V_rk @ V_rk.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(U_lr.T @ G_lk, V_rk, rtol=0, atol=1e-12)
    torch.testing.assert_close((V_rk @ right[:, :6]).abs(), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-4)
    assert torch.equal(V_rk, low_rank(G_lk, 6)[1])
    doubled, V_rk = low_rank(torch.cat([G_lk[:3], G_lk[:3], torch.zeros(1, 90)]), 5)
    assert V_rk.shape[0] == doubled.shape[1] == 3, "the spectrum ends"
    with pytest.raises(ValueError, match="all landmark gradients are zero"):
        low_rank(torch.zeros(4, 5), 2)


POOL = ragged("....rrr", "..rr..rr", "....", "...r", "rrrr", seed=5)
TARGETS = ragged("..rrr", "...r", "", ".rr.r.", seed=6)
ADAM = OptimizerOptions(type="adam")


@pytest.mark.parametrize("scaled", [None, "exact", "factored"])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_terms_are_the_curvature_between_directions(kind, scaled):
    """Whatever the projection and the chunks: M is v_iᵀHv_j in full space, of the directions that V stands for."""
    model = build("gpt2")
    scaling = None if scaled is None else gradient_scaling(model, "down_proj", ADAM, random_state(model), scaled)
    projection = GradientProjection(dim=192, seed=4, directions=40)
    G_nk = per_sample_gradients(model, POOL, projection=projection, scaling=scaling).values
    U_nr, _ = low_rank(G_nk, 3)
    b = random_directions(model, 1)
    offset = {name: value[0] for name, value in b.items()}
    common = {"kind": kind, "coefficients": U_nr, "scaling": scaling, "projection": projection}
    result, part = second_order_terms(
        model, POOL, [TARGETS, TARGETS.slice(0, 2)], offset=offset, direction_bytes=1, token_budget=9, **common
    )
    (whole,) = second_order_terms(model, POOL, [TARGETS], offset=None, **common)
    (alone,) = second_order_terms(model, POOL, [TARGETS.slice(0, 2)], offset=offset, **common)
    torch.testing.assert_close((part.M_rr, part.Hb_k), (alone.M_rr, alone.Hb_k), rtol=1e-10, atol=1e-14)
    assert result.asymmetry < 1e-10
    torch.testing.assert_close(result.M_rr, whole.M_rr, rtol=1e-10, atol=0)
    assert whole.Hb_k is None

    directions = weighted_gradients(model, POOL, U_nr)
    directions = {name: v if scaling is None else scaling.times(name, v) for name, v in directions.items()}
    M_rr = flat(directions) @ flat(curvature_products(model, TARGETS, directions, kind=kind)).T
    assert relative_error(result.M_rr, M_rr) < 1e-10
    if kind == "ggn":
        assert torch.linalg.eigvalsh(result.M_rr).min() >= -1e-12 * result.M_rr.norm()
    full = curvature_products(model, TARGETS, b, kind=kind)
    Hb_k = plain_projection({name: value[0] for name, value in full.items()}, projection)
    assert relative_error(result.Hb_k, Hb_k) < 1e-12


def test_fisher_is_the_mean_outer_product_of_target_gradients():
    model, n = build("gpt2"), len(POOL)
    scaling = gradient_scaling(model, "down_proj", ADAM, random_state(model))
    G_nk = per_sample_gradients(model, POOL, projection=None, scaling=scaling).values
    G_tk = per_sample_gradients(model, TARGETS, projection=None).values
    b = random_directions(model, 1)
    b_k = flat(b)[0]
    H_kk = G_tk.T @ G_tk / len(TARGETS)
    B_nt, M_tt = quadratic_factors("fisher", n=n, P_nt=G_nk @ G_tk.T)
    Q_nn = B_nt @ M_tt @ B_nt.T
    assert relative_error(Q_nn, G_nk @ H_kk @ G_nk.T / n) < 1e-12
    assert torch.linalg.eigvalsh(Q_nn).min() > -1e-14 * Q_nn.norm()
    Gb_t = directional_derivatives(model, TARGETS, b)[:, 0]
    assert relative_error(offset_influence("fisher", P_nt=G_nk @ G_tk.T, Gb_t=Gb_t), G_nk @ H_kk @ b_k) < 1e-10


def test_errors_name_what_is_wrong():
    model = build("gpt2")
    directions = random_directions(model, 2)
    name = next(iter(directions))
    with pytest.raises(ValueError, match="kind must be ggn or hessian, not 'fisher'"):
        curvature_products(model, TARGETS, directions, kind="fisher")
    with pytest.raises(ValueError, match="directions: must have the chosen layers"):
        curvature_products(model, TARGETS, {name: directions[name]}, kind="ggn")
    with pytest.raises(ValueError, match=rf"directions: {name} must be \(2, 24, 96\), not \(2, 96, 24\)"):
        curvature_products(model, TARGETS, {**directions, name: directions[name].mT}, kind="ggn")
    with pytest.raises(ValueError, match="targets: there are none"):
        curvature_products(model, TARGETS.slice(0, 0), directions, kind="ggn")
    with pytest.raises(ValueError, match=r"coefficients must be \(5, r\)"):
        second_order_terms(
            model,
            POOL,
            [TARGETS],
            kind="ggn",
            coefficients=torch.ones(4, 1),
            scaling=None,
            offset=None,
            projection=None,
        )
    with pytest.raises(ValueError, match="curvature fisher needs P_nt"):
        quadratic_factors("fisher", n=3)
