"""What one optimiser step on weighted samples does to the target loss, measured and predicted (METHOD 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .batching import Progress
from .causal_lm import check_layers, linear_layers
from .errors import UnusableInput
from .exact_gradients import directional_derivatives, sample_losses, weighted_gradients
from .hessian_vector_products import Layers, curvature_products, stepped
from .optimizers import LayerWeight, OptimizerOptions, OptimizerState, layer_weights
from .samples import Samples

CurvatureKind = Literal["none", "fisher", "ggn", "hessian"]


def optimizer_step(
    model: Any,
    modules: str,
    options: OptimizerOptions,
    state: OptimizerState | None,
    mean_gradient: Layers,
    *,
    frozen_second: bool = False,
) -> dict[str, Tensor]:
    """The update of the chosen weights that torch.optim's step of this optimiser makes, (O, I) by layer name (METHOD 1).

    `mean_gradient` g is that of the step's loss, (O, I) by layer name. Adam's second moment takes it in, unless `frozen_second`:
    then the update is -η (a ⊙ g + b), what the selection assumes. float32, float64 for a float64 model. Raises UnusableInput
    that names the parameter whose state is missing or mis-shaped, ValueError for gradients that do not fit the layers.
    """
    check_layers("mean_gradient", linear_layers(model, modules), {k: g_OI[None] for k, g_OI in mean_gradient.items()})
    weights = layer_weights(model, modules)
    return {
        name: -options.learning_rate * _direction(options, state, weight, mean_gradient[name], frozen_second)
        for name, weight in weights.items()
    }


def _direction(
    options: OptimizerOptions, state: OptimizerState | None, weight: LayerWeight, g_OI: Tensor, frozen_second: bool
) -> Tensor:
    """The step of one layer before the learning rate and its sign."""
    decay_OI = options.weight_decay * weight.value() if options.weight_decay and options.type != "none" else None
    g_OI = g_OI.to(next(weight.module.parameters()).device, weight.dtype)
    if decay_OI is not None and options.type != "adamw":  # AdamW's decay passes by the moments
        g_OI = g_OI + decay_OI
    if not options.is_adam:
        carries = options.type == "sgd" and options.momentum > 0
        return g_OI + options.momentum * weight.moment(state, "first") if carries else g_OI
    first_OI, second_OI = weight.moment(state, "first"), weight.moment(state, "second")
    assert state is not None  # has moments
    beta1, beta2 = options.betas
    if not frozen_second:
        second_OI = torch.lerp(g_OI.square(), second_OI, beta2)
    root_OI = (second_OI / (1 - beta2 ** (state.step + 1))).sqrt() + options.eps
    direction_OI = torch.lerp(g_OI, first_OI, beta1) / (1 - beta1 ** (state.step + 1)) / root_OI
    return direction_OI if options.type == "adam" or decay_OI is None else direction_OI + decay_OI


def predicted_change(
    model: Any,
    targets: Samples,
    update: Layers,
    *,
    curvature: CurvatureKind = "none",
    modules: str = "down_proj",
    token_budget: int | None = None,
) -> tuple[float, float | None]:
    """Change of the mean target loss that a Taylor expansion predicts for `update` u, in nats: first and second order (METHOD 1).

    First order is the mean over targets of g_jᵀu; `curvature` adds ½uᵀHu, and without it the second order is None. One pass over
    the targets, another for `ggn` and `hessian`. Raises as the functions it calls.
    """
    u_1OI = {name: value[None] for name, value in update.items()}
    products_t1 = directional_derivatives(model, targets, u_1OI, modules=modules, token_budget=token_budget)
    gu_t = products_t1[:, 0].double()
    first = float(gu_t.mean())
    if curvature == "none":
        return first, None
    if curvature == "fisher":
        return first, first + float(gu_t.square().mean()) / 2
    quarter = token_budget and max(token_budget // 4, 1)
    Hu_1OI = curvature_products(model, targets, u_1OI, kind=curvature, modules=modules, token_budget=quarter)
    uHu = sum(float((Hu_1OI[name][0] * update[name]).sum(dtype=torch.float64)) for name in update)
    return first, first + uHu / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMeasure:
    """Effect of one step on the mean loss of some targets, in nats a response token.

    loss_before, and measured: the change of it by a true step.
    predicted_first, predicted_second: the change that the expansion predicts, with Adam's second moment frozen as the selection
        assumes; second order is None where there is no curvature.
    """

    loss_before: float
    measured: float
    predicted_first: float
    predicted_second: float | None


def measure_step(
    model: Any,
    selection: Samples,
    weights_n: Tensor,
    targets: Sequence[Samples],
    *,
    options: OptimizerOptions,
    state: OptimizerState | None,
    curvature: CurvatureKind = "none",
    modules: str = "down_proj",
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> list[StepMeasure]:
    """One step on the weighted selection, and what it does to each of the sets of targets (METHOD 8).

    The step's gradient is Σ w_i g_i / Σ w_i with w = `weights_n` (n,), not negative. The model is left as it was. One weighted
    backward pass over the selection; for each set two forward passes and one backward, and the curvature's. `progress` is over
    the selection. Raises UnusableInput for weights that are not one a sample, negative or all zero, ValueError for an empty
    set of targets, and as the functions it calls.
    """
    if (
        tuple(weights_n.shape) != (len(selection),)
        or not bool((weights_n >= 0).all())
        or not float(weights_n.sum()) > 0
    ):
        raise UnusableInput(f"weights must be {len(selection)} numbers, not negative and not all zero")
    if not all(len(part) for part in targets):
        raise ValueError("targets: a set of targets is empty")
    share_n1 = (weights_n.double() / weights_n.double().sum())[:, None]
    gradients = weighted_gradients(
        model, selection, share_n1, modules=modules, token_budget=token_budget, progress=progress
    )
    mean_gradient = {name: value_cOI[0] for name, value_cOI in gradients.items()}
    update = optimizer_step(model, modules, options, state, mean_gradient)
    assumed = optimizer_step(model, modules, options, state, mean_gradient, frozen_second=True)
    measures = []
    for part in targets:
        before_t = sample_losses(model, part, token_budget=token_budget).double()
        with stepped(model, update, modules):
            after_t = sample_losses(model, part, token_budget=token_budget).double()
        first, second = predicted_change(
            model, part, assumed, curvature=curvature, modules=modules, token_budget=token_budget
        )
        changed = float((after_t - before_t).mean())
        measures.append(
            StepMeasure(
                loss_before=float(before_t.mean()), measured=changed, predicted_first=first, predicted_second=second
            )
        )
    return measures
