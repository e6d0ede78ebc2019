"""Curvature of the mean target loss: its products with directions (METHOD 1, "Curvature, four choices").

A weight is moved by a term x DeltaT added to its layer's output, Delta a leaf of zeros that requires grad. So the weight itself
is never touched or differentiated, be it quantised, tied or bfloat16, and the derivatives are those of the chosen layers
alone. With h the hidden states that predict response tokens, L(h) the loss and J = dh/dDelta,

    hessian v = JT (d2L/dh2 J v) + d/dDelta <JT u, v> at u = dL/dh,      ggn v = JT (JhT C Jh) (J v)

with Jh the derivative of the head's logits and C that of the cross-entropy's gradient in the logits. J v is the derivative of
<JT u, v> in u, so one differentiable backward pass a batch serves all directions, in reverse mode throughout.

Shape suffixes: t targets, c directions, B samples of a batch, T tokens, R response positions, D hidden size, V vocabulary,
O and I layer output and input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .backward import LOGIT_BYTES, head_loss, predicted_tokens
from .batching import Progress, default_token_budget, padded, run_batches
from .dual import attention_named
from .models import (
    accumulation_dtype,
    check_head,
    check_samples,
    frozen,
    head_logits,
    hidden_states,
    linear_layers,
    linear_size,
    parameter_device,
    parameter_dtype,
)
from .samples import BoolArray, IntArray, Samples, last_marked

Curvature = Literal["ggn", "hessian"]
Layers = Mapping[str, Tensor]
"""Values by layer name: (O, I), or (c, O, I) for c directions."""


@contextmanager
def stepped(model: Any, update: Layers, modules: str = "down_proj") -> Iterator[None]:
    """The model with `update`, (O, I) by layer name, added to its weights: y + x updateT at each layer, weights untouched.

    The term is computed in the update's dtype. Where the layer's own is shorter, the sum is rounded to it at random (seeded),
    right in the mean: most of an optimiser's step is below half a unit in the last place of bfloat16, and would be rounded away.
    Raises ValueError where names or shapes are not those of the chosen layers.
    """
    chosen = linear_layers(model, modules)
    check_layers("update", chosen, {name: value[None] for name, value in update.items()})
    hooks = {name: partial(_add, delta_OI=delta_OI, generators={}) for name, delta_OI in update.items()}
    handles = [chosen[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(
    _: nn.Module,
    inputs: tuple[Tensor, ...],
    output_BTO: Tensor,
    *,
    delta_OI: Tensor,
    generators: dict[torch.device, torch.Generator],
) -> Tensor:
    dtype, device = delta_OI.dtype, output_BTO.device
    sum_BTO = output_BTO.to(dtype) + inputs[0].to(device, dtype) @ delta_OI.to(device).mT
    if output_BTO.dtype == dtype or delta_OI.requires_grad:  # a leaf of zeros changes no value
        return sum_BTO.to(output_BTO.dtype)
    if device not in generators:
        generators[device] = torch.Generator(device).manual_seed(0)
    dither_BTO = torch.rand(sum_BTO.shape, generator=generators[device], dtype=dtype, device=device) - 0.5
    exponent_BTO = torch.frexp(sum_BTO).exponent
    return (sum_BTO + torch.ldexp(dither_BTO * torch.finfo(output_BTO.dtype).eps, exponent_BTO - 1)).to(
        output_BTO.dtype
    )


def check_layers(what: str, chosen: Mapping[str, nn.Module], values: Layers) -> None:
    """Raise ValueError where `values` (c, O, I) are not one for each chosen layer, of its shape, and of one count c."""
    if set(values) != set(chosen):
        raise ValueError(f"{what}: must have the chosen layers {sorted(chosen)}, not {sorted(values)}")
    count = next(iter(values.values())).shape[0]
    for name, module in chosen.items():
        size = linear_size(module)
        assert size is not None
        if tuple(values[name].shape) != (count, *size):
            raise ValueError(f"{what}: {name} must be {(count, *size)}, not {tuple(values[name].shape)}")


def curvature_products(
    model: Any,
    targets: Samples,
    directions: Layers,
    *,
    kind: Curvature,
    modules: str = "down_proj",
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """H v of the mean target loss for each direction v, (c, O, I) by layer name (METHOD 1).

    H is the Hessian or the generalised Gauss-Newton matrix of the mean over the t targets of each one's mean response
    cross-entropy, in the chosen layers' weights; a target without a predicted token counts as loss 0. Values are float32 (float64
    from a float64 model), on each direction's device. Needs 2 c d values beside the model and the batch's activations, d the
    number of chosen weights; with N parameters and T tokens, on `down_proj`, 5 N T operations, and for each direction 5 N T for
    `ggn`, 9 N T for `hessian`. `token_budget` bounds the padded tokens of a batch; None is a quarter of the device's default.

    Raises ValueError for an unknown kind, no targets, and directions that do not fit the layers; torch.OutOfMemoryError where
    one target alone does not fit.
    """
    if kind not in ("ggn", "hessian"):
        raise ValueError(f"kind must be ggn or hessian, not {kind!r}")
    if not len(targets):
        raise ValueError("targets: there are none; curvature is of the mean target loss")
    check_samples(model, targets)
    chosen = linear_layers(model, modules)
    check_layers("directions", chosen, directions)
    dtype = accumulation_dtype(parameter_dtype(model))
    counted = targets.predictable()
    lengths = np.maximum(last_marked(counted, targets.offsets), 0)
    active = np.flatnonzero(lengths)
    products = {name: torch.zeros_like(v_cOI, dtype=dtype) for name, v_cOI in directions.items()}
    with frozen(model):
        check_head(model)
        leaves = {name: _zeros(module, dtype) for name, module in chosen.items()}
        with stepped(model, leaves, modules), _twice_differentiable(model):

            def run(batch: IntArray) -> None:
                _add_batch(model, targets, counted, active[batch], lengths, leaves, directions, products, kind)

            def restart() -> None:
                for product_cOI in products.values():
                    product_cOI.zero_()

            budget = default_token_budget(parameter_device(model)) // 4 if token_budget is None else token_budget
            run_batches(lengths[active], budget, run, progress, restart)
    return {name: product_cOI / len(targets) for name, product_cOI in products.items()}


def _zeros(module: nn.Module, dtype: torch.dtype) -> Tensor:
    size = linear_size(module)
    assert size is not None
    return torch.zeros(size, dtype=dtype, device=next(module.parameters()).device, requires_grad=True)


@contextmanager
def _twice_differentiable(model: Any) -> Iterator[None]:
    """Attention in plain products and softmax: the fused kernels have no second derivative."""
    implementation = model.config._attn_implementation
    name = "eager" if "flash" in implementation or "flex" in implementation else implementation
    with attention_named(model.config, name), sdpa_kernel(SDPBackend.MATH):
        yield


def _add_batch(
    model: Any,
    targets: Samples,
    counted: BoolArray,
    indices: IntArray,
    lengths: IntArray,
    leaves: Layers,
    directions: Layers,
    products: Layers,
    kind: Curvature,
) -> None:
    """Add the products (c, O, I) of the summed loss of one batch to `products`."""
    deltas = list(leaves.values())
    with torch.enable_grad():
        ids_BT = padded(targets, indices, lengths, parameter_device(model))
        hidden_BTD = hidden_states(model, model.base_model, ids_BT)
        row_R, before_R, labels_R, weights_R = predicted_tokens(targets, counted, indices, hidden_BTD.device)
        hidden_RD = hidden_BTD[row_R, before_R]
        u_RD = head_loss(model, hidden_RD.detach(), labels_R, weights_R, backward=True)[1].requires_grad_()
        slopes = torch.autograd.grad(hidden_RD, deltas, u_RD, create_graph=True, materialize_grads=True)
    for j in range(next(iter(directions.values())).shape[0]):
        with torch.enable_grad():
            terms = [(s * directions[name][j].to(s)).sum() for name, s in zip(leaves, slopes, strict=True)]
            slope = torch.stack([term.to(hidden_RD.device) for term in terms]).sum()
        wanted = [u_RD, *deltas] if kind == "hessian" else [u_RD]
        tangent_RD, *second = torch.autograd.grad(slope, wanted, retain_graph=True, materialize_grads=True)
        turned_RD = _head_product(model, hidden_RD.detach(), tangent_RD, labels_R, weights_R, kind)
        first = torch.autograd.grad(hidden_RD, deltas, turned_RD, retain_graph=True, materialize_grads=True)
        for part in (first, second):
            for name, value in zip(leaves, part, strict=False):  # ggn has no second part
                products[name][j] += value.to(products[name].device)


def _head_product(
    model: Any, hidden_RD: Tensor, tangent_RD: Tensor, labels_R: Tensor, weights_R: Tensor, kind: Curvature
) -> Tensor:
    """Second derivative of the weighted loss in the hidden states times a tangent, (R, D), in pieces of bounded memory."""
    dtype = accumulation_dtype(hidden_RD.dtype)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    step = max(LOGIT_BYTES // (vocabulary * dtype.itemsize), 1)
    product_RD = torch.empty_like(hidden_RD)
    for start in range(0, hidden_RD.shape[0], step):
        part = slice(start, start + step)
        weights_R1 = weights_R[part, None].to(dtype)
        with torch.enable_grad():
            piece_RD = hidden_RD[part].requires_grad_()
            logits_RV = head_logits(model, piece_RD)
            if kind == "hessian":
                loss_R = nn.functional.cross_entropy(logits_RV.to(dtype), labels_R[part], reduction="none")
                (slope_RD,) = torch.autograd.grad((loss_R * weights_R1[:, 0]).sum(), piece_RD, create_graph=True)
                (product_RD[part],) = torch.autograd.grad(slope_RD, piece_RD, tangent_RD[part])
                continue
            u_RV = torch.zeros_like(logits_RV).requires_grad_()
            (slope_RD,) = torch.autograd.grad(logits_RV, piece_RD, u_RV, create_graph=True)
            (turned_RV,) = torch.autograd.grad(slope_RD, u_RV, tangent_RD[part], retain_graph=True)
        share_RV = logits_RV.detach().to(dtype).softmax(dim=-1)
        weighed_RV = weights_R1 * share_RV * turned_RV.to(dtype)
        curved_RV = weighed_RV - share_RV * weighed_RV.sum(dim=-1, keepdim=True)
        (product_RD[part],) = torch.autograd.grad(logits_RV, piece_RD, curved_RV.to(logits_RV.dtype))
    return product_RD
