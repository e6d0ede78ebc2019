"""One optimiser step, predicted and measured (METHOD 8; METHOD 9, point 3), against torch.optim on a copy of the model."""

import copy
from dataclasses import replace

import pytest
import torch
from support.numerics_reference import EXACT, build, ragged, relative_error, role_layers

from worker.influence import (
    OptimizerOptions,
    gradient_scaling,
    low_rank,
    measure_step,
    offset_influence,
    optimizer_step,
    per_sample_gradients,
    predicted_change,
    quadratic_factors,
    sample_losses,
    second_order_terms,
    state_of,
    step_offset,
    stepped,
)
from worker.influence.exact_gradients import plain_loss
from worker.influence.hessian_vector_products import _add

POOL = ragged("....rrr", "..rr..rr", "....", "...r", "rrrr", "....rrr", seed=5)
POOL = POOL.take([0, 1, 2, 3, 4, 5, 0])  # the first twice
TARGETS = ragged("..rrr", "...r", "", ".rr.r.", seed=6)

OPTIMIZERS = {
    "sgd": OptimizerOptions(type="sgd"),
    "momentum": OptimizerOptions(type="sgd", momentum=0.9, weight_decay=0.01),
    "adam": OptimizerOptions(type="adam", betas=(0.9, 0.99), weight_decay=0.01),
    "adamw": OptimizerOptions(type="adamw", betas=(0.9, 0.99), weight_decay=0.01),
}


def torch_optimizer(model, options, learning_rate):
    parameters = [module.weight for module, _ in role_layers(model).values()]
    common = {"lr": learning_rate, "weight_decay": options.weight_decay}
    if options.type == "sgd":
        return torch.optim.SGD(parameters, momentum=options.momentum, **common)
    kind = torch.optim.Adam if options.type == "adam" else torch.optim.AdamW
    return kind(parameters, betas=options.betas, eps=options.eps, **common)


def mean_loss(model, samples, weights=None):
    weights = torch.ones(len(samples), dtype=torch.float64) if weights is None else weights
    losses = [plain_loss(model, samples, i) for i in range(len(samples))]
    return sum(w * x for w, x in zip(weights, losses, strict=True) if x is not None) / weights.sum()


def warmed(family, options):
    """A model and its optimiser after three real steps, on batches unlike the pool."""
    model = build(family)
    optimizer = torch_optimizer(model, options, 1e-3)
    for seed in range(3):
        optimizer.zero_grad()
        mean_loss(model, ragged("..rrr", "...rr", seed=20 + seed)).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model, optimizer


def real_step(model, optimizer, options, learning_rate, weights, *, frozen):
    """Change of the mean target loss by torch.optim's own step on a copy of the model.

    `frozen`: the second moment before the step is set so that it is, after it, what it was.
    """
    stepping = copy.deepcopy(model)
    other = torch_optimizer(stepping, options, learning_rate)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.param_groups[0]["lr"] = learning_rate
    mean_loss(stepping, POOL, weights).backward()
    if frozen and options.type != "sgd":
        beta2 = options.betas[1]
        for parameter, values in other.state.items():
            decay = options.weight_decay * parameter.detach() if options.type == "adam" else 0.0
            v = values["exp_avg_sq"]
            values["exp_avg_sq"] = (v - (1 - beta2) * (parameter.grad + decay).square()) / beta2
    with torch.no_grad():
        before = mean_loss(stepping, TARGETS)
        other.step()
        return float(mean_loss(stepping, TARGETS) - before), stepping


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_objective_predicts_a_real_step_to_third_order(name, family, record_property):
    options = OPTIMIZERS[name]
    model, optimizer = warmed(family, options)
    state = state_of(optimizer, model)
    scaling = gradient_scaling(model, "down_proj", options, state)
    b = step_offset(model, "down_proj", options, state)
    n, weights = len(POOL), torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5, 1.25, 0.75], dtype=torch.float64)

    G_nk = per_sample_gradients(model, POOL, projection=None, scaling=scaling).values
    G_tk = per_sample_gradients(model, TARGETS, projection=None).values
    U_nr, V_rk = low_rank(G_nk, n)
    assert V_rk.shape[0] == n - 2, "an empty sample and a duplicate add no direction"
    (terms,) = second_order_terms(
        model, POOL, [TARGETS], kind="hessian", coefficients=U_nr, scaling=scaling, offset=b, projection=None
    )
    B_nr, M_rr = quadratic_factors("hessian", n=n, B_nr=G_nk @ V_rk.T, M_rr=terms.M_rr)
    Qw_n = B_nr @ (M_rr @ (B_nr.T @ weights))
    assert terms.asymmetry < 1e-9

    def residual(eta):
        p_n = G_nk @ G_tk.mean(dim=0)
        rest = 0.0  # what f leaves out, for it does not depend on w
        if b is not None:
            p_n = p_n - eta * offset_influence("hessian", G_nk=G_nk, Hb_k=terms.Hb_k)
            _, rest = predicted_change(model, TARGETS, {k: -eta * v for k, v in b.items()}, curvature="hessian")
        f = float(-p_n @ weights + eta / 2 * weights @ Qw_n)
        return real_step(model, optimizer, options, eta, weights, frozen=True)[0] - (eta / n * f + rest)

    eta = {"sgd": 0.05, "momentum": 0.02}.get(name, 5e-3)
    errors = [residual(eta / 2**i) for i in range(4)]
    ratios = [errors[i] / errors[i + 1] for i in range(3)]
    print(name, family, eta, [f"{e:.2e}" for e in errors], [f"{r:.3f}" for r in ratios])
    assert ratios[-1] == pytest.approx(8, rel=0.1)
    true, frozen = (real_step(model, optimizer, options, 1e-4, weights, frozen=kind)[0] for kind in (False, True))
    print(
        f"{name} {family}: freezing v, lr 1e-4: true {true:.4e}, frozen {frozen:.4e}, error {abs(frozen / true - 1):.1%}"
    )
    record_property("error_of_freezing_v", abs(frozen / true - 1))


def by_layer(model, value):
    """Of each chosen layer what `value` makes of its weight, as (O, I)."""
    return {
        name: (value(module.weight).T if transposed else value(module.weight)).detach().clone()
        for name, (module, transposed) in role_layers(model).items()
    }


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_and_measure_are_those_of_torch_optim(name, family):
    options = replace(OPTIMIZERS[name], learning_rate=0.01)
    model, optimizer = warmed(family, options)
    state = state_of(optimizer, model)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5, 1.25, 0.75], dtype=torch.float64)
    change, after = real_step(model, optimizer, options, options.learning_rate, weights, frozen=False)
    mean_loss(model, POOL, weights).backward()
    mean_gradient = by_layer(model, lambda weight: weight.grad)
    model.zero_grad(set_to_none=True)
    update = optimizer_step(model, "down_proj", options, state, mean_gradient)
    old, new = (by_layer(m, lambda weight: weight) for m in (model, after))
    for layer in update:
        assert relative_error(update[layer], new[layer] - old[layer]) < 1e-10

    scaling = gradient_scaling(model, "down_proj", options, state)
    b = step_offset(model, "down_proj", options, state) or dict.fromkeys(update, 0.0)
    frozen = optimizer_step(model, "down_proj", options, state, mean_gradient, frozen_second=True)
    for layer, g in mean_gradient.items():
        expected = -options.learning_rate * ((g if scaling is None else scaling.times(layer, g)) + b[layer])
        assert relative_error(frozen[layer], expected) < 1e-12

    (all_targets, some) = measure_step(
        model, POOL, weights * 3, [TARGETS, TARGETS.slice(0, 1)], options=options, state=state, curvature="hessian"
    )
    assert all_targets.measured == pytest.approx(change, rel=1e-9)
    assert all_targets.loss_before == pytest.approx(float(mean_loss(model, TARGETS).detach()), rel=1e-12)
    assert some.loss_before != all_targets.loss_before
    first, second = predicted_change(model, TARGETS, frozen, curvature="hessian")
    assert all_targets.predicted_first == pytest.approx(first, rel=1e-10)
    assert all_targets.predicted_second == pytest.approx(second, rel=1e-10)
    with stepped(model, frozen):
        real = float((sample_losses(model, TARGETS).mean()) - all_targets.loss_before)
    assert abs(real - second) < abs(real - first)


@pytest.mark.parametrize("family", EXACT)
def test_a_stepped_model_is_one_with_other_weights_and_leaves_no_trace(family):
    model = build(family)
    update = by_layer(model, lambda weight: torch.sin(weight * 50) * 0.01)
    before = sample_losses(model, POOL)
    with stepped(model, update):
        inside = sample_losses(model, POOL)
    with pytest.raises(RuntimeError, match="inside"), stepped(model, update):
        raise RuntimeError("inside")
    assert torch.equal(sample_losses(model, POOL), before)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        for name, (module, transposed) in role_layers(model).items():
            module.weight += update[name].T if transposed else update[name]
    assert relative_error(inside, sample_losses(model, POOL)) < 1e-12
    assert relative_error(inside, before) > 1e-4
    with pytest.raises(ValueError, match="update: must have the chosen layers"), stepped(model, {}):
        pass


@torch.no_grad()
def test_small_steps_of_a_bfloat16_model_are_not_rounded_away():
    """Steps of 1/500 of the output: below half a unit in the last place, so that nearest rounding would lose most of each."""
    layer = torch.nn.Linear(64, 512, bias=False, dtype=torch.bfloat16)
    update = (layer.weight.detach() / 500).float()
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    plain = layer(x)
    changed = _add(layer, (x,), plain, delta_OI=update, generators={})
    assert changed.dtype == torch.bfloat16
    moved = ((changed - plain).float() * plain.sign()).sum() / plain.float().abs().sum() * 500
    assert float(moved) == pytest.approx(1, abs=0.1)
    nearest = ((plain.float() + x.float() @ update.T).to(torch.bfloat16) - plain).float() * plain.sign()
    assert float(nearest.sum() / plain.float().abs().sum() * 500) < 0.5
    again = _add(layer, (x,), plain, delta_OI=update, generators={})
    assert torch.equal(changed, again)


def test_fisher_prediction_is_the_mean_square_of_slopes():
    model = build("gpt2")
    update = by_layer(model, lambda weight: torch.cos(weight * 50) * 0.01)
    G_tk = per_sample_gradients(model, TARGETS, projection=None).values
    slopes = G_tk @ torch.cat([value.flatten() for value in update.values()])
    first, second = predicted_change(model, TARGETS, update, curvature="fisher")
    assert first == pytest.approx(float(slopes.mean()), rel=1e-10)
    assert second == pytest.approx(first + float(slopes.square().mean()) / 2, rel=1e-10)
    assert predicted_change(model, TARGETS, update) == (pytest.approx(first), None)


def test_errors_name_what_is_wrong():
    model, options = build("gpt2"), OptimizerOptions(type="adam")
    for weights in (torch.ones(2), torch.zeros(len(POOL)), -torch.ones(len(POOL)), torch.full((len(POOL),), torch.nan)):
        with pytest.raises(ValueError, match="weights must be 7 numbers"):
            measure_step(model, POOL, weights, [TARGETS], options=options, state=None)
    with pytest.raises(ValueError, match="a set of targets is empty"):
        measure_step(model, POOL, torch.ones(7), [TARGETS, TARGETS.slice(0, 0)], options=options, state=None)
    with pytest.raises(ValueError, match=r"no first moment of transformer\.h\.0\.mlp\.c_proj\.weight"):
        measure_step(model, POOL, torch.ones(7), [TARGETS], options=options, state=None)
