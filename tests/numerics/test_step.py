"""One optimiser step, predicted and measured (METHOD 8; METHOD 9, point 3), against torch.optim on a copy of the model."""

import copy

import numpy as np
import pytest
import torch
from numerics_reference import EXACT, MIXED, build, one_by_one_loss, ragged, relative_error, role_layers

from worker.influence import (
    OptimizerOptions,
    OptimizerState,
    directional_derivatives,
    gradient_scaling,
    per_sample_gradients,
    sample_losses,
    state_of,
    step_offset,
)
from worker.influence.second_order import (
    low_rank,
    offset_influence,
    quadratic_factors,
    second_order_terms,
)
from worker.influence.step import measure_step, optimizer_step, predicted_change, stepped

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
    losses = [one_by_one_loss(model, samples, i) for i in range(len(samples))]
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
    terms = second_order_terms(
        model, POOL, TARGETS, kind="hessian", coefficients=U_nr, scaling=scaling, offset=b, projection=None
    )
    B_nr, M_rr = quadratic_factors("hessian", n=n, B_nr=G_nk @ V_rk.T, M_rr=terms.M_rr)
    Qw_n = B_nr @ (M_rr @ (B_nr.T @ weights))
    assert terms.asymmetry < 1e-9

    def residual(eta):
        p_n = G_nk @ G_tk.mean(dim=0)
        rest = 0.0  # what f leaves out, for it does not depend on w
        if b is not None:
            p_n = p_n - eta * offset_influence("hessian", G_nk=G_nk, Hb_k=terms.Hb_k)
            first, second = predicted_change(model, TARGETS, {k: -eta * v for k, v in b.items()}, curvature="hessian")
            rest = second
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
