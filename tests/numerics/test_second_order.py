"""Curvature products, low-rank directions and the factors of Q (METHOD 1; METHOD 9, point 3) against torch.func."""

import pytest
import torch
from numerics_reference import EXACT, MIXED, build, flattened, one_by_one_loss, ragged, relative_error, role_layers
from torch import nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from worker.influence import (
    GradientProjection,
    OptimizerOptions,
    OptimizerState,
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

FAMILIES_WITH_FLOAT32_INSIDE = ("llama", "qwen2", "gemma2")
FLOAT32_INTERNALS = 1e-5


@pytest.fixture(autouse=True)
def _math_attention():
    with sdpa_kernel(SDPBackend.MATH):  # the references need second derivatives too
        yield


def weights_of(model):
    prefix = model.base_model_prefix
    return {f"{prefix}.{name}.weight": module.weight.detach() for name, (module, _) in role_layers(model).items()}


def loss_function(model, samples):
    """Mean loss over the samples as a function of {parameter name: value}, from one plain forward a sample."""

    def loss(values):
        def model_at(ids):
            return functional_call(model, values, (ids,), {"use_cache": False})

        losses = [one_by_one_loss(model_at, samples, i) for i in range(len(samples))]
        return sum(x for x in losses if x is not None) / len(samples)

    return loss


def random_directions(model, count, seed=0):
    """Directions (c, O, I) by layer name, and the same by parameter name in the layout of the parameter."""
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = {}, [{} for _ in range(count)]
    for name, (module, transposed) in role_layers(model).items():
        size = module.weight.T.shape if transposed else module.weight.shape
        ours[name] = torch.randn(count, *size, generator=generator, dtype=torch.float64)
        for j in range(count):
            value = ours[name][j].T if transposed else ours[name][j]
            theirs[j][f"{model.base_model_prefix}.{name}.weight"] = value.contiguous()
    return ours, theirs


def flat(model, layers, j):
    """Direction j in one row, each parameter in its own layout."""
    return torch.cat([(layers[n][j].T if t else layers[n][j]).flatten() for n, (_, t) in role_layers(model).items()])


def flat_values(values):
    return torch.cat([value.flatten() for value in values.values()])


def gauss_newton_product(model, samples, values, direction):
    """JT C J v sample by sample: C the second derivative of the cross-entropy in the logits."""
    total = torch.zeros_like(flat_values(values))
    for i in range(len(samples)):
        ids = torch.from_numpy(samples.input_ids[samples.offsets[i] : samples.offsets[i + 1]].astype("int64"))
        marked = torch.from_numpy(samples.response[samples.offsets[i] : samples.offsets[i + 1]].copy())
        at = [p for p in range(1, len(ids)) if marked[p]]
        if not at:
            continue

        def logits(values, ids=ids, at=at):
            return functional_call(model, values, (ids[None],), {"use_cache": False}).logits[0][[p - 1 for p in at]]

        def entropy(z, ids=ids, at=at):
            return nn.functional.cross_entropy(z, ids[at])

        z, dz = jvp(logits, (values,), (direction,))
        curved = jvp(grad(entropy), (z,), (dz,))[1]
        total += flat_values(vjp(logits, values)[1](curved)[0])
    return total / len(samples)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("family", [*EXACT, *FAMILIES_WITH_FLOAT32_INSIDE])
def test_products_equal_torch_func(family, kind):
    model, samples = build(family), ragged(*MIXED)
    directions, reference = random_directions(model, 2)
    values = weights_of(model)
    if kind == "hessian":
        slope = grad(loss_function(model, samples))
        expected = [flat_values(jvp(slope, (values,), (direction,))[1]).detach() for direction in reference]
    else:
        expected = [gauss_newton_product(model, samples, values, direction).detach() for direction in reference]
    for token_budget in (1, 23, 10_000) if family in EXACT else (23,):
        result = curvature_products(model, samples, directions, kind=kind, token_budget=token_budget)
        for j in range(2):
            tolerance = 1e-10 if family in EXACT else FLOAT32_INTERNALS
            assert relative_error(flat(model, result, j), expected[j]) < tolerance
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_products_are_those_of_the_explicit_matrix(kind):
    model = build("llama_float64", hidden_size=8, intermediate_size=6, num_hidden_layers=2)
    samples = ragged("..rrr", "...r", ".rr..rr")
    values = weights_of(model)
    d = flat_values(values).numel()
    basis = {name: torch.zeros(d, *value.shape, dtype=torch.float64) for name, value in values.items()}
    start = 0
    for name, value in values.items():
        basis[name].view(d, -1)[start : start + value.numel()] = torch.eye(value.numel(), dtype=torch.float64)
        start += value.numel()
    directions = {name: basis[f"model.{name}.weight"] for name in role_layers(model)}
    ours = curvature_products(model, samples, directions, kind=kind)
    matrix = torch.cat([value.flatten(1) for value in ours.values()], dim=1)

    def loss(flat):
        cut = dict(zip(values, flat.split([value.numel() for value in values.values()]), strict=True))
        return loss_function(model, samples)({name: cut[name].view_as(values[name]) for name in values})

    if kind == "hessian":
        assert relative_error(matrix, torch.func.hessian(loss)(flat_values(values)).detach()) < 1e-10
    else:
        assert torch.linalg.eigvalsh(matrix).min() > -1e-12 * matrix.norm()
    assert relative_error(matrix, matrix.T) < 1e-10


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_adapters_over_a_base_that_takes_no_gradient(kind):
    """Second derivatives in LoRA's A and B, which are multiplied with one another, against an explicit weight."""
    from peft import LoraConfig, inject_adapter_in_model

    model, samples = build("gpt2"), ragged("..rrr", "...r", "", ".r.rr")
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["c_proj"], fan_in_fan_out=True), model)
    generator = torch.Generator().manual_seed(3)
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for parameter in adapters.values():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
    values = {name: parameter.detach() for name, parameter in adapters.items()}
    direction = {name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in values.items()}
    ours = {name.removeprefix("transformer.").removesuffix(".weight"): v[None] for name, v in direction.items()}
    result = curvature_products(model, samples, ours, kind=kind, modules="lora", token_budget=8)
    if kind == "hessian":
        expected = flat_values(jvp(grad(loss_function(model, samples)), (values,), (direction,))[1])
    else:
        expected = gauss_newton_product(model, samples, values, direction)
    assert relative_error(torch.cat([result[name].flatten() for name in ours]), expected.detach()) < 1e-10


def test_running_out_of_memory_adds_nothing_twice():
    model, samples = build("gpt2"), ragged(*MIXED)
    directions, _ = random_directions(model, 2)
    expected = curvature_products(model, samples, directions, kind="hessian", token_budget=1000)
    head, calls = model.lm_head, []

    def scarce(*_):
        calls.append(None)
        if len(calls) == 5:  # in the middle of the directions of a batch
            raise torch.OutOfMemoryError("scarce")

    handle = head.register_forward_pre_hook(scarce)
    result = curvature_products(model, samples, directions, kind="hessian", token_budget=40)
    handle.remove()
    for name in expected:
        assert relative_error(result[name], expected[name]) < 1e-12


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


def adam_state(model):
    generator = torch.Generator().manual_seed(2)
    shapes = {name: value.shape for name, value in weights_of(model).items()}
    first = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.01 for name, shape in shapes.items()
    }
    second = {name: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for name, shape in shapes.items()}
    return OptimizerState(step=3, first=first, second=second)


@pytest.mark.parametrize("scaled", [None, "exact", "factored"])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_terms_are_the_curvature_between_directions(kind, scaled):
    """Whatever the projection and the chunks: M is v_iT H v_j in full space, of the directions that V stands for."""
    model = build("gpt2")
    scaling = None if scaled is None else gradient_scaling(model, "down_proj", ADAM, adam_state(model), scaled)
    projection = GradientProjection(dim=192, seed=4, directions=40)
    G_nk = per_sample_gradients(model, POOL, projection=projection, scaling=scaling).values
    U_nr, _ = low_rank(G_nk, 3)
    b, _ = random_directions(model, 1)
    offset = {name: value[0] for name, value in b.items()}
    common = {"kind": kind, "coefficients": U_nr, "scaling": scaling, "projection": projection}
    result = second_order_terms(model, POOL, TARGETS, offset=offset, direction_bytes=1, token_budget=9, **common)
    whole = second_order_terms(model, POOL, TARGETS, offset=None, **common)
    assert result.asymmetry < 1e-10
    torch.testing.assert_close(result.M_rr, whole.M_rr, rtol=1e-10, atol=0)
    assert whole.Hb_k is None

    directions = weighted_gradients(model, POOL, U_nr)
    directions = {name: v if scaling is None else scaling.times(name, v) for name, v in directions.items()}
    products = curvature_products(model, TARGETS, directions, kind=kind)
    M_rr = sum(directions[name].flatten(1) @ products[name].flatten(1).T for name in directions)
    assert relative_error(result.M_rr, M_rr) < 1e-10
    if kind == "ggn":
        assert torch.linalg.eigvalsh(result.M_rr).min() >= -1e-12 * result.M_rr.norm()
    full = curvature_products(model, TARGETS, b, kind=kind)
    Hb_k = flattened([(name, full[name][0]) for name in role_layers(model)], projection)
    assert relative_error(result.Hb_k, Hb_k) < 1e-12


def test_fisher_is_the_mean_outer_product_of_target_gradients():
    model, n = build("gpt2"), len(POOL)
    scaling = gradient_scaling(model, "down_proj", ADAM, adam_state(model))
    G_nk = per_sample_gradients(model, POOL, projection=None, scaling=scaling).values
    G_tk = per_sample_gradients(model, TARGETS, projection=None).values
    b, _ = random_directions(model, 1)
    b_k = torch.cat([value[0].flatten() for value in b.values()])
    H_kk = G_tk.T @ G_tk / len(TARGETS)
    B_nt, M_tt = quadratic_factors("fisher", n=n, P_nt=G_nk @ G_tk.T)
    Q_nn = B_nt @ M_tt @ B_nt.T
    assert relative_error(Q_nn, G_nk @ H_kk @ G_nk.T / n) < 1e-12
    assert torch.linalg.eigvalsh(Q_nn).min() > -1e-14 * Q_nn.norm()
    slopes_t = directional_derivatives(model, TARGETS, b)[:, 0]
    assert relative_error(offset_influence("fisher", P_nt=G_nk @ G_tk.T, slopes_t=slopes_t), G_nk @ H_kk @ b_k) < 1e-10


def test_errors_name_what_is_wrong():
    model = build("gpt2")
    directions, _ = random_directions(model, 2)
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
            model, POOL, TARGETS, kind="ggn", coefficients=torch.ones(4, 1), scaling=None, offset=None, projection=None
        )
    with pytest.raises(ValueError, match="curvature fisher needs P_nt"):
        quadratic_factors("fisher", n=3)
