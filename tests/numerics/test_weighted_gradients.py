"""Weighted sums of gradients, products with directions and losses against autograd one sample at a time (METHOD 1)."""

import numpy as np
import pytest
import torch
from support.numerics_reference import (
    EXACT,
    MIXED,
    adapter_layers,
    build,
    plain_losses,
    ragged,
    relative_error,
    role_layers,
    with_adapters,
)

from worker.influence import directional_derivatives, exact_gradients, sample_losses, weighted_gradients
from worker.influence.exact_gradients import plain_gradients

N = len(MIXED)
FAMILIES = dict.fromkeys(EXACT, 1e-10) | dict.fromkeys(("qwen2", "gemma2", "gpt_neox"), 1e-6)


def flat(by_layer):
    """(c, O, I) by layer -> (c, d)."""
    return torch.cat([part.flatten(1) for part in by_layer.values()], dim=1)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def directions_of(layers, count):
    sizes = {name: m.weight.T.shape if transposed else m.weight.shape for name, (m, transposed) in layers.items()}
    return {name: random(count, *size) for name, size in sizes.items()}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("token_budget", [1, 23, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_autograd(family, token_budget, count, monkeypatch):
    monkeypatch.setattr(exact_gradients, "PIECE_BYTES", 3 * 24 * 96 * 8)
    model, samples = build(family), ragged(*MIXED)
    gradients = plain_gradients(model, samples)
    weights, directions = random(N, count), directions_of(role_layers(model), count)
    sums = weighted_gradients(model, samples, weights.numpy(), token_budget=token_budget)
    assert list(sums) == list(role_layers(model))
    assert relative_error(flat(sums), weights.T @ gradients) < FAMILIES[family]
    products = directional_derivatives(model, samples, directions, token_budget=token_budget)
    assert relative_error(products, gradients @ flat(directions).T) < FAMILIES[family]
    assert not products[[2, 4, 5]].any()
    losses = sample_losses(model, samples, token_budget=token_budget)
    torch.testing.assert_close(losses, plain_losses(model, samples), rtol=FAMILIES[family], atol=1e-12)


@pytest.mark.parametrize("family", EXACT)
def test_adapters(family):
    model, samples = with_adapters(build(family)), ragged(*MIXED)
    weights = random(N, 2)
    sums = weighted_gradients(model, samples, weights, modules="lora")
    directions = directions_of(adapter_layers(model), 2)
    products = directional_derivatives(model, samples, directions, modules="lora")
    model.eval()
    gradients = plain_gradients(model, samples, modules="lora")
    assert relative_error(flat(sums), weights.T @ gradients) < 1e-10
    assert relative_error(products, gradients @ flat(directions).T) < 1e-10


def test_samples_of_weight_zero_are_not_run():
    model, samples, seen = build("gpt2"), ragged(*MIXED), []
    weights = torch.zeros(N, 2)
    weights[[0, 8], 1] = 1.0
    sums = weighted_gradients(model, samples, weights, progress=lambda done, total: seen.append((done, total)))
    gradients = plain_gradients(model, samples)
    assert seen[-1] == (2, 2)
    assert relative_error(flat(sums)[1], gradients[0] + gradients[8]) < 1e-10
    assert not flat(sums)[0].any()
    assert not flat(weighted_gradients(model, samples, torch.zeros(N, 1))).any()


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_that_runs_out_of_memory_is_not_counted_twice(count):
    """It fails in the backward pass, when the later layers have been added already."""
    model, samples = build("gpt2"), ragged(*MIXED)
    weights = random(N, count)
    expected = flat(weighted_gradients(model, samples, weights))
    failures = []

    def scarce(module, args, output):
        def check(grad):
            if grad.shape[0] * grad.shape[1] > 20:
                failures.append(grad.shape)
                raise torch.OutOfMemoryError("simulated")

        if output.requires_grad:
            output.register_hook(check)

    handle = model.transformer.h[1].mlp.c_fc.register_forward_hook(scarce)
    sums = weighted_gradients(model, samples, weights, token_budget=60)
    handle.remove()
    assert failures
    assert relative_error(flat(sums), expected) < 1e-12


def test_samples_that_are_not_finite_are_named():
    model = build("llama", torch.float32)
    samples = ragged("..rr", "..rr", "..rr")
    with torch.no_grad():
        model.model.embed_tokens.weight[int(samples.input_ids[4])] = float("nan")
    affected = [i for i in range(3) if samples.input_ids[4] in samples.input_ids[4 * i : 4 * i + 3]]
    listed = ", ".join(map(str, affected))
    for count in (1, 2):
        with pytest.raises(ValueError, match=rf"without a finite gradient: {listed} \({len(affected)} in all\)"):
            weighted_gradients(model, samples, np.ones((3, count)))
    weights = np.ones((3, 1))
    weights[affected] = 0
    assert all(part.isfinite().all() for part in weighted_gradients(model, samples, weights).values())


def test_a_gradient_that_overflows_where_the_loss_is_finite_is_named():
    model, samples = build("llama", torch.float32), ragged("..rr", "...rr")

    def explode(module, args, output):
        scale = torch.ones(len(output), 1, 1)
        scale[output.shape[0] - 1] = float("inf")
        if output.requires_grad:
            output.register_hook(lambda grad: grad * scale)

    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(explode)
    with pytest.raises(ValueError, match=r"without a finite gradient: 0 \(1 in all\)"):
        weighted_gradients(model, samples, np.ones((2, 1)))
    handle.remove()


def test_float32_and_bfloat16_are_close_to_float64():
    samples, weights = ragged(*MIXED), random(N, 2)
    exact = flat(weighted_gradients(build("llama"), samples, weights))
    directions = directions_of(role_layers(build("llama")), 2)
    products = directional_derivatives(build("llama"), samples, directions)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.08)):
        model = build("llama", dtype)
        sums = flat(weighted_gradients(model, samples, weights))
        assert sums.dtype == torch.float32
        assert relative_error(sums.double(), exact) < tolerance
        assert relative_error(directional_derivatives(model, samples, directions).double(), products) < tolerance


def test_errors_say_what_does_not_fit():
    model, samples = build("llama"), ragged("..r")
    for weights in (torch.ones(2, 1), torch.ones(1), torch.full((1, 1), torch.inf)):
        with pytest.raises(ValueError, match=r"weights_nc must be finite and \(1, c\)"):
            weighted_gradients(model, samples, weights)
    directions = directions_of(role_layers(model), 2)
    with pytest.raises(ValueError, match=r"directions: layers.0.mlp.down_proj must be \(2, 24, 40\)"):
        directional_derivatives(model, samples, {name: v.mT for name, v in directions.items()})
    one_less = {**directions, "layers.0.mlp.down_proj": directions["layers.0.mlp.down_proj"][:1]}
    with pytest.raises(ValueError, match=r"must be \(1, 24, 40\), not \(2, 24, 40\)"):
        directional_derivatives(model, samples, one_less)
    del directions["layers.2.mlp.down_proj"]
    with pytest.raises(ValueError, match="directions: must have the chosen layers"):
        directional_derivatives(model, samples, directions)
