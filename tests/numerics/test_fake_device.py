"""No pass of the core mixes devices: each runs on a device that is not there (support/fake_device.py), without values.

With the CPU build of torch the device is `meta`. With the CUDA build, which is gigabytes and not in CI, the forward passes run on
CUDA tensors too; CONTRIBUTING.md says how.
"""

import numpy as np
import pytest
import torch
from support.fake_device import fake_device, put_on
from support.numerics_reference import build, ragged, random_state, with_adapters
from torch._subclasses.fake_tensor import FakeTensor

from worker.influence import (
    EmbeddingOptions,
    GradientProjection,
    OptimizerOptions,
    cosine_influence,
    curvature_products,
    directional_derivatives,
    embed,
    gradient_scaling,
    measure_step,
    per_sample_gradients,
    sample_losses,
    second_order_terms,
    step_offset,
    weighted_gradients,
)
from worker.influence.causal_lm import layer_size, linear_layers
from worker.loading.adapters import trainable
from worker.training import Training, train

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(torch.version.cuda is None, reason="not a CUDA build of torch"))
FAMILIES = ("llama", "gemma2", "gpt2", "gpt_neox")  # of each kind of attention, norm and layer
SAMPLES = ragged("....rrr", "..rr...rrr", "......", "rrrr")
PROJECTION = GradientProjection(dim=64, directions=16)
SGD, ADAM = (OptimizerOptions(type=kind, momentum=0.9, weight_decay=0.1) for kind in ("sgd", "adamw"))

families = pytest.mark.parametrize("family", FAMILIES)
forward_devices = pytest.mark.parametrize("device", ["meta", CUDA])


@pytest.fixture(autouse=True)
def _nothing_is_real():
    with fake_device():
        yield


def made(family, dtype=torch.bfloat16, device="meta", adapters=False):
    model = put_on(device, lambda: with_adapters(build(family)) if adapters else build(family))
    assert {p.device.type for p in model.parameters()} == {device}
    assert all(isinstance(p, FakeTensor) for p in model.parameters())
    return model


def directions_of(model, device, modules="down_proj"):
    sizes = {name: layer_size(layer) for name, layer in linear_layers(model, modules).items()}
    return {name: torch.zeros(2, *size, device=device) for name, size in sizes.items()}


@forward_devices
@families
def test_losses(family, device):
    assert sample_losses(made(family, device), SAMPLES, token_budget=20).device.type == "cpu"


@forward_devices
@families
@pytest.mark.parametrize("kind", ["hidden", "jvp", "rds"])
def test_embeddings(family, kind, device):
    options = EmbeddingOptions(kind=kind, blocks=2, max_dim=20)
    found = embed(made(family, device), SAMPLES, options=options, token_budget=20)
    assert (found.device.type, found.shape) == ("cpu", (len(SAMPLES), 20))


@families
@pytest.mark.parametrize("size", [20, 4096])
def test_embeddings_by_the_output_layer(family, size):
    """Which take a derivative of the head, so that no device of their own would do."""
    found = embed(made(family), SAMPLES, options=EmbeddingOptions(kind="output", max_dim=size), token_budget=20)
    assert (found.device.type, found.shape) == ("cpu", (len(SAMPLES), min(size, 24**2)))


@pytest.mark.parametrize(("family", "projection"), [*((family, PROJECTION) for family in FAMILIES), ("llama", None)])
def test_gradients(family, projection):
    found = per_sample_gradients(made(family), SAMPLES, projection=projection, token_budget=20)
    assert found.values.device.type == found.loss.device.type == "cpu"


@pytest.mark.parametrize("kind", ["exact", "factored"])
def test_gradients_scaled_by_an_optimiser_whose_state_is_on_a_processor(kind):
    model = made("llama")
    scaling = gradient_scaling(model, "down_proj", ADAM, on_a_processor(model), kind)
    assert per_sample_gradients(model, SAMPLES, projection=PROJECTION, scaling=scaling).values.device.type == "cpu"


def on_a_processor(model):
    """An optimiser's state as a stage reads it."""
    state = random_state(model)
    assert {value.device.type for value in state.first.values()} == {"cpu"}
    return state


def test_gradients_of_adapters():
    model = made("llama", adapters=True)
    found = per_sample_gradients(model, SAMPLES, modules="lora", projection=PROJECTION)
    assert found.values.device.type == "cpu"


@families
def test_weighted_gradients_and_directional_derivatives(family):
    model = made(family)
    for count in (1, 2):
        sums = weighted_gradients(model, SAMPLES, np.ones((len(SAMPLES), count)), token_budget=20)
        assert {value.device.type for value in sums.values()} == {"meta"}
    assert directional_derivatives(model, SAMPLES, directions_of(model, "cpu")).device.type == "cpu"


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@families
def test_curvature_products(family, kind):
    model = made(family)
    found = curvature_products(model, SAMPLES, directions_of(model, "meta"), kind=kind, token_budget=20)
    assert {value.device.type for value in found.values()} == {"meta"}


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adamw"])
def test_second_order_terms(optimizer):
    model = made("llama")
    state = on_a_processor(model)
    found = second_order_terms(
        model,
        SAMPLES,
        [SAMPLES],
        kind="ggn",
        coefficients=torch.zeros(len(SAMPLES), 3, dtype=torch.float64),
        scaling=gradient_scaling(model, "down_proj", optimizer, state),
        offset=step_offset(model, "down_proj", optimizer, state),
        projection=PROJECTION,
    )
    assert found[0].M_rr.device.type == found[0].Hb_k.device.type == "cpu"


@pytest.mark.parametrize("curvature", ["none", "fisher", "ggn"])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adamw"])
def test_a_step_of_the_optimiser(optimizer, curvature):
    model = made("llama")
    state, weights_n = on_a_processor(model), torch.ones(len(SAMPLES))
    measure_step(model, SAMPLES, weights_n, [SAMPLES], options=optimizer, state=state, curvature=curvature)


@forward_devices
def test_influence(device):
    G_nk, G_tk = torch.zeros(40, 8, device=device), torch.zeros(3, 8, device=device)
    assert cosine_influence(G_nk, G_tk).device.type == device


def test_a_warm_up():
    model = made("llama", torch.float32)
    options = Training(epochs=1, learning_rate=1e-3, batch_size=3, optimizer=ADAM, seed=0, token_budget=20)
    chosen = SAMPLES.take(np.flatnonzero(SAMPLES.predicted()))
    train(model, trainable(model), chosen, options, report=lambda *_: None, progress=lambda *_: None)


def test_what_mixes_devices_is_seen():
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(2, 2, device="meta") @ torch.zeros(2, 2)
    with pytest.raises(TypeError, match="numpy"):
        torch.zeros(2, device="meta").numpy()
