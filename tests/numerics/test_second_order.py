"""Curvature products, low-rank directions and the factors of Q (METHOD 1; METHOD 9, point 3) against torch.func."""

import pytest
import torch
from numerics_reference import EXACT, MIXED, build, one_by_one_loss, ragged, relative_error, role_layers
from torch import nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from worker.influence.curvature import curvature_products

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
