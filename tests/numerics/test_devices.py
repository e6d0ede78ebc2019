"""The core in float32 and bfloat16, on a processor and on a GPU, against itself in float64 on a processor: what that computes is
compared with plain references by the other tests. `make gpu-check` runs the half that is marked `cuda`."""

import copy
from dataclasses import astuple

import numpy as np
import pytest
import torch
from support.numerics_reference import MIXED, build, ragged, random_state, relative_error

from worker.influence import (
    EmbeddingOptions,
    GradientProjection,
    KernelRidge,
    OptimizerOptions,
    cosine_influence,
    curvature_products,
    directional_derivatives,
    embed,
    gradient_scaling,
    measure_step,
    per_sample_gradients,
    sample_losses,
    weighted_gradients,
)
from worker.influence.causal_lm import layer_size, linear_layers
from worker.influence.forward_mode import attention_chunk_bytes
from worker.process.machine import repeat_bits

WITHOUT_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, WITHOUT_CUDA])]
FAMILIES = ("llama", "gemma2", "gpt2")
BUDGETS = (1, 29, 10_000)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Of the norm of all values. A processor stayed below 1.1e-6 and 0.016."""

pytestmark = [pytest.mark.parametrize("device", DEVICES)]
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "bfloat16"])
families = pytest.mark.parametrize("family", FAMILIES)


def pair(family, dtype, device):
    """A model on the device, and one of the same weights in float64 on a processor."""
    model = build(family, dtype)
    reference = copy.deepcopy(model).double()
    return model.to(device), reference


def check(found, expected, dtype):
    assert torch.isfinite(found).all()
    assert relative_error(found.cpu().double(), expected) < TOLERANCE[dtype]


def random_directions(model):
    generator = torch.Generator().manual_seed(0)
    sizes = {name: layer_size(layer) for name, layer in linear_layers(model, "down_proj").items()}
    return {name: torch.randn(2, *size, generator=generator) for name, size in sizes.items()}


def on(device, values):
    return {name: value.to(device) for name, value in values.items()}


def flat(layers):
    return torch.cat([value.flatten(1).cpu() for value in layers.values()], dim=1)


@dtypes
@families
@pytest.mark.parametrize("projection", [None, GradientProjection(dim=256, directions=16)], ids=["whole", "projected"])
def test_gradients_and_losses(family, projection, dtype, device):
    (model, reference), samples = pair(family, dtype, device), ragged(*MIXED)
    expected = per_sample_gradients(reference, samples, projection=projection)
    for budget in BUDGETS:
        found = per_sample_gradients(model, samples, projection=projection, token_budget=budget)
        check(found.values, expected.values, dtype)
        check(found.loss, expected.loss, dtype)
        check(sample_losses(model, samples, token_budget=budget), expected.loss, dtype)


@dtypes
@pytest.mark.parametrize("kind", ["exact", "factored"])
def test_gradients_scaled_by_an_optimiser(kind, dtype, device):
    (model, reference), samples = pair("llama", dtype, device), ragged(*MIXED)
    projection, adam = GradientProjection(dim=256, directions=16), OptimizerOptions(type="adam")
    scalings = [gradient_scaling(one, "down_proj", adam, random_state(reference), kind) for one in (model, reference)]
    found, expected = (
        per_sample_gradients(one, samples, projection=projection, scaling=scaling)
        for one, scaling in zip((model, reference), scalings, strict=True)
    )
    check(found.values, expected.values, dtype)


@dtypes
@families
@pytest.mark.parametrize("kind", ["hidden", "jvp", "rds", "output"])
def test_embeddings(family, kind, dtype, device):
    (model, reference), samples = pair(family, dtype, device), ragged(*MIXED)
    options = EmbeddingOptions(kind=kind, blocks=2, max_dim=20)
    expected = embed(reference, samples, options=options)
    for budget in BUDGETS:
        check(embed(model, samples, options=options, token_budget=budget), expected, dtype)


@dtypes
@families
def test_weighted_gradients_and_directional_derivatives(family, dtype, device):
    (model, reference), samples = pair(family, dtype, device), ragged(*MIXED)
    directions = random_directions(model)
    weights_nc = np.random.default_rng(0).uniform(0.5, 1.5, (len(samples), 2))
    sums = flat(weighted_gradients(reference, samples, weights_nc))
    products = directional_derivatives(reference, samples, directions)
    for budget in BUDGETS:
        check(flat(weighted_gradients(model, samples, weights_nc, token_budget=budget)), sums, dtype)
        found = directional_derivatives(model, samples, on(device, directions), token_budget=budget)
        check(found, products, dtype)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@families
def test_curvature_products(family, kind, device):
    (model, reference), samples = pair(family, torch.float32, device), ragged(*MIXED)
    directions = random_directions(model)
    expected = flat(curvature_products(reference, samples, directions, kind=kind))
    for budget in BUDGETS:
        found = curvature_products(model, samples, on(device, directions), kind=kind, token_budget=budget)
        check(flat(found), expected, torch.float32)


def test_a_step_of_the_optimiser(device):
    (model, reference), samples = pair("llama", torch.float32, device), ragged(*MIXED)
    options = OptimizerOptions(type="adamw", learning_rate=1e-2, weight_decay=0.1)
    state, weights_n = random_state(reference), torch.linspace(0.5, 1.5, len(samples))
    found, expected = (
        measure_step(one, samples, weights_n, [samples], options=options, state=state, curvature="ggn")[0]
        for one in (model, reference)
    )
    assert astuple(found) == pytest.approx(astuple(expected), rel=1e-3)


def test_a_step_in_bfloat16_is_rounded_to_the_mean(device):
    (model, reference), samples = pair("llama", torch.bfloat16, device), ragged(*MIXED)
    options = OptimizerOptions(type="sgd", learning_rate=1e-1)
    weights_n = torch.ones(len(samples))
    found, expected = (
        measure_step(one, samples, weights_n, [samples], options=options, state=None)[0] for one in (model, reference)
    )
    assert found.predicted_first == pytest.approx(expected.predicted_first, rel=0.06)
    assert found.measured == pytest.approx(expected.measured, rel=0.5)


def test_influence_and_its_propagation(device):
    generator = torch.Generator().manual_seed(0)
    E_le, P_lt, E_me, G_tk = (torch.randn(*size, generator=generator) for size in ((40, 8), (40, 3), (9, 8), (3, 8)))
    found, expected = (KernelRidge.fit(E_le.to(where), P_lt.to(where), ridge=None) for where in (device, "cpu"))
    assert found.delta == pytest.approx(expected.delta)
    assert relative_error(found.predict(E_me).cpu(), expected.predict(E_me)) < 1e-10
    assert relative_error(found.leave_one_out().cpu(), expected.leave_one_out()) < 1e-10
    P_mt = cosine_influence(E_me.to(device), G_tk.to(device))
    assert relative_error(P_mt.cpu(), cosine_influence(E_me.double(), G_tk.double())) < 1e-6


@pytest.fixture
def repeating(device, monkeypatch):
    """What the compute process sets, for the time of one test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fills = torch.utils.deterministic.fill_uninitialized_memory
    repeat_bits(torch.device(device))
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


@dtypes
@pytest.mark.usefixtures("repeating")
def test_embeddings_and_losses_are_the_same_bits_again(dtype, device):
    assert torch.are_deterministic_algorithms_enabled() is (device == "cuda")
    (model, _), samples = pair("llama", dtype, device), ragged(*MIXED * 20)
    for kind in ("hidden", "jvp", "rds", "output"):
        options = EmbeddingOptions(kind=kind, blocks=2)
        assert torch.equal(embed(model, samples, options=options), embed(model, samples, options=options)), kind
    assert torch.equal(sample_losses(model, samples), sample_losses(model, samples))


def test_attention_of_forward_mode_is_cut_to_the_cache_of_a_processor_alone(device):
    assert attention_chunk_bytes(torch.device(device)) == (4 if device == "cpu" else 256) * 2**20
