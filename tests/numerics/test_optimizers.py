"""Scaling and offset of an optimiser's next step against the formulas and against torch's own step (METHOD 1)."""

import numpy as np
import pytest
import torch
from support.numerics_reference import (
    EXACT,
    build,
    ragged,
    random_state,
    relative_error,
    role_layers,
    with_adapters,
)

from worker.influence import (
    OptimizerOptions,
    OptimizerState,
    gradient_scaling,
    load_state,
    save_state,
    state_of,
    step_offset,
)
from worker.influence.exact_gradients import plain_loss
from worker.influence.optimizers import rank_one

BETAS, EPS = (0.8, 0.97), 1e-4
TORCH = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.7, "weight_decay": 0.05}),
    "adam": (torch.optim.Adam, {"betas": BETAS, "eps": EPS}),
    "adam_decay": (torch.optim.Adam, {"betas": BETAS, "eps": EPS, "weight_decay": 0.05}),
    "adamw": (torch.optim.AdamW, {"betas": BETAS, "eps": EPS, "weight_decay": 0.05}),
}


def options_of(kind, learning_rate):
    values = {"weight_decay": 0.0, **TORCH[kind][1]}
    name = {"momentum": "sgd", "adam_decay": "adam"}.get(kind, kind)
    return OptimizerOptions(type=name, learning_rate=learning_rate, **values)


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("kind", TORCH)
def test_equals_a_step_of_torch(family, kind):
    """theta' - theta = -lr (a g + b), with the second moment set so that the step leaves it at v."""
    model, samples, rate = build(family), ragged("..rr", "...rrr"), 0.01
    layers = role_layers(model)
    optimizer = TORCH[kind][0]([module.weight for module, _ in layers.values()], lr=rate, **TORCH[kind][1])

    def backward(i):
        optimizer.zero_grad()
        plain_loss(model, samples, i).backward()

    for _ in range(3):
        backward(0)
        optimizer.step()
    backward(1)
    state = state_of(optimizer, model)
    assert state.step == (3 if kind.startswith("adam") else 0)
    second = {}
    for parameter, values in optimizer.state.items():
        decay = TORCH[kind][1].get("weight_decay", 0.0) if kind == "adam_decay" else 0.0
        gradient = parameter.grad + decay * parameter.detach()
        if "exp_avg_sq" in values:  # torch's next v is then beta2 (old / beta2) + (1 - beta2) g^2: what is frozen here
            name = next(name for name, p in model.named_parameters() if p is parameter)
            second[name] = values["exp_avg_sq"] + (1 - BETAS[1]) * gradient**2
            values["exp_avg_sq"] = values["exp_avg_sq"] / BETAS[1]
    state = OptimizerState(step=state.step, first=state.first, second=second)

    options = options_of(kind, rate)
    scaling = gradient_scaling(model, "down_proj", options, state)
    offset = step_offset(model, "down_proj", options, state)
    assert (scaling is None) == (offset is None or kind == "momentum") == (not kind.startswith("adam"))
    expected = {}
    for name, (module, transposed) in layers.items():
        gradient = module.weight.grad.T if transposed else module.weight.grad
        update = gradient if scaling is None else scaling.times(name, gradient)
        update = update if offset is None else update + offset[name]
        expected[name] = module.weight.detach().clone() - rate * (update.T if transposed else update)
    optimizer.step()
    for name, (module, _) in layers.items():
        before = expected[name]
        torch.testing.assert_close(module.weight.detach(), before, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_equals_the_formula(family, kind):
    model = build(family)
    state = random_state(model)
    options = options_of(kind, 1e-3)
    scaling, offset = (f(model, "down_proj", options, state) for f in (gradient_scaling, step_offset))
    for name, (module, transposed) in role_layers(model).items():
        full = next(n for n, p in model.named_parameters() if p is module.weight)
        m, v = state.first[full].numpy(), state.second[full].numpy()
        root = np.sqrt(v / (1 - BETAS[1] ** 8)) + EPS
        a = (1 - BETAS[0]) / (1 - BETAS[0] ** 8) / root
        b = BETAS[0] * m / (1 - BETAS[0] ** 8) / root + options.weight_decay * module.weight.detach().numpy()
        for ours, theirs in ((scaling.full[name], a), (offset[name], b)):
            np.testing.assert_allclose(ours.numpy(), theirs.T if transposed else theirs, rtol=1e-12)


def test_nothing_to_scale_or_to_add():
    model = build("gpt2")
    for options in (OptimizerOptions(), OptimizerOptions(type="sgd", learning_rate=1.0)):
        assert gradient_scaling(model, "down_proj", options, None) is None
        assert step_offset(model, "down_proj", options, None) is None
    decay = step_offset(model, "down_proj", OptimizerOptions(type="sgd", weight_decay=0.5), None)
    assert torch.equal(decay["h.1.mlp.c_proj"], 0.5 * model.transformer.h[1].mlp.c_proj.weight.T)


def test_state_of_adapters_is_matched_by_name():
    model = with_adapters(build("llama", torch.bfloat16))
    options = options_of("adamw", 1e-3)
    state = random_state(model)
    scaling = gradient_scaling(model, "lora", options, state)
    name = "layers.1.mlp.up_proj.lora_B.default"
    assert scaling.full[name].dtype == torch.float32
    v = state.second[f"model.{name}.weight"].float()
    torch.testing.assert_close(
        scaling.full[name], (1 - BETAS[0]) / (1 - BETAS[0] ** 8) / ((v / (1 - BETAS[1] ** 8)).sqrt() + EPS)
    )


def test_factors_are_those_of_adafactor():
    generator = torch.Generator().manual_seed(0)
    v = torch.rand(30, 50, generator=generator, dtype=torch.float64) ** 4
    factored = torch.outer(v.mean(1), v.mean(0)) / v.mean()
    torch.testing.assert_close(torch.outer(*rank_one(3 / v.sqrt())), 3 / factored.sqrt(), rtol=1e-12, atol=0)
    exact = 3 / factored.sqrt()
    torch.testing.assert_close(torch.outer(*rank_one(exact)), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.outer(*rank_one(torch.full((9, 8), 1e25))), torch.full((9, 8), 1e25))


def test_a_weight_that_never_had_a_gradient_does_not_decide_the_factors():
    v = 10 ** (-2 * torch.rand(30, 50, generator=torch.Generator().manual_seed(0)) - 4)
    before = torch.outer(*rank_one(1 / (v.sqrt() + 1e-8)))
    v[3, 4] = 0.0
    v[7] = 0.0
    after = torch.outer(*rank_one(1 / (v.sqrt() + 1e-8)))
    alive = torch.arange(30) != 7
    assert relative_error(after[alive], before[alive]) < 0.05
    assert after.isfinite().all()


def test_error_of_the_factors():
    model = build("gpt2")
    state, options = random_state(model), options_of("adam", 1e-3)
    exact, factored = (gradient_scaling(model, "down_proj", options, state, kind) for kind in ("exact", "factored"))
    assert exact.relative_error is None
    assert not factored.full
    ones = torch.ones(1, dtype=torch.float64)
    whole = torch.cat([a.flatten() for a in exact.full.values()])
    parts = torch.cat([factored.times(name, ones).flatten() for name in exact.full])
    assert factored.relative_error == pytest.approx(relative_error(parts, whole), rel=1e-9)
    for name, error in factored.layer_errors.items():
        assert error == pytest.approx(relative_error(factored.times(name, ones), exact.full[name]), rel=1e-9)


def test_round_trip(tmp_path):
    model = build("gpt2", torch.float32)
    state = random_state(model)
    transposed = {name: tensor.mT if tensor.ndim == 2 else tensor for name, tensor in state.first.items()}
    save_state(OptimizerState(step=7, first=transposed, second=state.second), tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors")
    assert loaded.step == 7
    assert loaded.first.keys() == loaded.second.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(loaded.first[name], transposed[name]) for name in transposed)
    assert all(torch.equal(loaded.second[name], state.second[name]) for name in state.second)


def test_files_that_are_no_state(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not one")
    with pytest.raises(ValueError, match=r"x.safetensors is not a safetensors file"):
        load_state(path)
    save_file({"third.w": torch.zeros(1)}, path, metadata={"step": "3"})
    with pytest.raises(ValueError, match=r"'third.w' is neither first.<parameter> nor"):
        load_state(path)
    save_file({"first.w": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="metadata must have the number of finished steps"):
        load_state(path)
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "none.safetensors")


def test_errors_name_the_parameter():
    model, options = build("gpt2"), options_of("adam", 1e-3)
    state = random_state(model)
    name = "transformer.h.1.mlp.c_proj.weight"
    lacking = OptimizerState(step=7, first=state.first, second={k: v for k, v in state.second.items() if k != name})
    turned = OptimizerState(step=7, first=state.first, second={**state.second, name: state.second[name].T})
    for kind in ("exact", "factored"):
        with pytest.raises(ValueError, match=rf"no second moment of {name}.*warm the model up"):
            gradient_scaling(model, "down_proj", options, lacking, kind)
        with pytest.raises(ValueError, match=rf"{name} has shape \(24, 96\), the parameter \(96, 24\)"):
            gradient_scaling(model, "down_proj", options, turned, kind)
    with pytest.raises(ValueError, match=r"no second moment of transformer.h.0.mlp.c_proj.weight \(it has 0 param"):
        gradient_scaling(model, "down_proj", options, None)
    with pytest.raises(ValueError, match=r"no first moment of transformer.h.0.mlp.c_proj.weight"):
        step_offset(model, "down_proj", OptimizerOptions(type="sgd", momentum=0.5), None)
    with pytest.raises(ValueError, match="state is of step 0"):
        gradient_scaling(model, "down_proj", options, OptimizerState(step=0, first=state.first, second=state.second))
    wrong = OptimizerState(step=7, first=state.first, second={**state.second, name: -state.second[name]})
    with pytest.raises(ValueError, match=rf"second moment of {name} is negative or not finite"):
        gradient_scaling(model, "down_proj", options, wrong)
    with pytest.raises(ValueError, match="kind must be exact or factored"):
        gradient_scaling(model, "down_proj", options, state, "best")
    with pytest.raises(ValueError, match="type must be none, sgd, adam or adamw"):
        OptimizerOptions(type="lion")


def test_quantised_weights_do_not_decay():
    model = build("llama")
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(
        torch.zeros(480, 1, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"weight_decay of model.layers.0.mlp.down_proj.weight: a quantised"):
        step_offset(model, "down_proj", OptimizerOptions(type="sgd", weight_decay=0.5), None)


def test_optimizers_that_do_not_fit():
    model = build("gpt2")
    weights = [module.weight for module, _ in role_layers(model).values()]
    optimizer = torch.optim.AdamW(weights)
    for step in range(2):
        plain_loss(model, ragged("..rr"), 0).backward()
        if step:
            weights[0].grad = None
        optimizer.step()
    with pytest.raises(ValueError, match=r"stepped \[1, 2\] times"):
        state_of(optimizer, model)
    with pytest.raises(ValueError, match=r"shape \(96, 24\) not of this model"):
        state_of(optimizer, build("gpt2"))
