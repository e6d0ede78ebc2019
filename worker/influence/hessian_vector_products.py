"""Curvature of the mean target loss: its products with directions (METHOD 1, "Curvature, four choices").

A weight is moved by a term x Δᵀ added to its layer's output, Δ a leaf of zeros that requires grad. So the weight itself is never
touched or differentiated, be it quantised, tied or bfloat16, and the derivatives are those of the chosen layers alone. With h the
hidden states that predict response tokens, L(h) the loss, u = dL/dh and J = dh/dΔ,

    Hessian:  H v = Jᵀ (d²L/dh² (J v)) + d/dΔ ⟨Jᵀu, v⟩        Gauss-Newton:  H v = Jᵀ (J_zᵀ C J_z) (J v)

with J_z the derivative of the head's logits and C that of the cross-entropy's gradient in the logits. J v is the derivative of
⟨Jᵀu, v⟩ in u, so one differentiable backward pass a batch serves all directions, in reverse mode throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .backward import head_loss, logit_pieces, predicted_tokens
from .batching import Progress, default_token_budget, padded, run_batches
from .causal_lm import (
    accumulation_dtype,
    check_head,
    check_layers,
    check_samples,
    frozen,
    head_logits,
    hidden_states,
    layer_size,
    linear_layers,
    output_by_input,
    parameter_device,
    parameter_dtype,
)
from .exact_gradients import plain_logits, plain_loss
from .forward_mode import attention_named
from .samples import BoolArray, IntArray, Samples, last_marked

Curvature = Literal["ggn", "hessian"]
Layers = Mapping[str, Tensor]
"""Values by layer name: (O, I), or (c, O, I) for c directions."""


@contextmanager
def stepped(model: Any, update: Layers, modules: str = "down_proj") -> Iterator[None]:
    """The model with `update`, (O, I) by layer name, added to its weights: y + x updateᵀ at each layer, weights untouched.

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

    Raises ValueError for an unknown kind, no targets, and directions that do not fit the layers; UnusableInput for a model
    or targets that cannot be used; torch.OutOfMemoryError where one target alone does not fit.
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
        leaves = {
            name: torch.zeros(layer_size(m), dtype=dtype, device=next(m.parameters()).device, requires_grad=True)
            for name, m in chosen.items()
        }
        with stepped(model, leaves, modules), _twice_differentiable(model):

            def run(batch: IntArray) -> None:
                _add_batch(model, targets, counted, active[batch], lengths, leaves, directions, products, kind)

            def restart() -> None:
                for product_cOI in products.values():
                    product_cOI.zero_()

            budget = default_token_budget(parameter_device(model)) // 4 if token_budget is None else token_budget
            run_batches(lengths[active], budget, run, progress, restart)
    return {name: product_cOI / len(targets) for name, product_cOI in products.items()}


def plain_curvature_products(
    model: Any, targets: Samples, directions: Layers, *, kind: Curvature, modules: str = "down_proj"
) -> dict[str, Tensor]:
    """`curvature_products` by derivatives with respect to the weights themselves, one target and one direction at a time.

    The model is in eval mode, the layers' weights require gradients, and its attention can be differentiated twice.
    """
    layers: dict[str, Any] = linear_layers(model, modules)
    weights = [layer.weight for layer in layers.values()]
    products = {name: torch.zeros_like(v_cOI) for name, v_cOI in directions.items()}
    for i, j in product(range(len(targets)), range(next(iter(directions.values())).shape[0])):
        if (loss := plain_loss(model, targets, i)) is None:
            continue
        v = [output_by_input(layer, directions[name][j]) for name, layer in layers.items()]
        if kind == "hessian":
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            found = torch.autograd.grad(gradients, weights, v, materialize_grads=True)
        else:
            logits_RV = plain_logits(model, targets, i)[0]
            u_RV = torch.zeros_like(logits_RV, requires_grad=True)
            jtu = torch.autograd.grad(logits_RV, weights, u_RV, create_graph=True)
            (jv_RV,) = torch.autograd.grad(jtu, u_RV, v, retain_graph=True)
            p_RV = logits_RV.detach().softmax(dim=-1)
            cjv_RV = p_RV * (jv_RV - (p_RV * jv_RV).sum(dim=-1, keepdim=True)) / len(logits_RV)
            found = torch.autograd.grad(logits_RV, weights, cjv_RV)
        for (name, layer), value in zip(layers.items(), found, strict=True):
            products[name][j] += output_by_input(layer, value) / len(targets)
    return products


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
        jtu = torch.autograd.grad(hidden_RD, deltas, u_RD, create_graph=True, materialize_grads=True)
    for j in range(next(iter(directions.values())).shape[0]):
        with torch.enable_grad():
            terms = [(g * directions[name][j].to(g)).sum() for name, g in zip(leaves, jtu, strict=True)]
            jtu_v = torch.stack([term.to(hidden_RD.device) for term in terms]).sum()
        wanted = [u_RD, *deltas] if kind == "hessian" else [u_RD]
        jv_RD, *bent = torch.autograd.grad(jtu_v, wanted, retain_graph=True, materialize_grads=True)
        head_jv_RD = _head_product(model, hidden_RD.detach(), jv_RD, labels_R, weights_R, kind)
        pulled = torch.autograd.grad(hidden_RD, deltas, head_jv_RD, retain_graph=True, materialize_grads=True)
        for part in (pulled, bent):
            for name, value in zip(leaves, part, strict=False):  # Gauss-Newton has no second part
                products[name][j] += value.to(products[name].device)


def _head_product(
    model: Any, hidden_RD: Tensor, jv_RD: Tensor, labels_R: Tensor, weights_R: Tensor, kind: Curvature
) -> Tensor:
    """The loss's curvature in the hidden states times J v, (R, D), in pieces of bounded memory."""
    dtype = accumulation_dtype(hidden_RD.dtype)
    product_RD = torch.empty_like(hidden_RD)
    for part in logit_pieces(model, hidden_RD.shape[0], dtype):
        weights_R1 = weights_R[part, None].to(dtype)
        with torch.enable_grad():
            piece_RD = hidden_RD[part].requires_grad_()
            logits_RV = head_logits(model, piece_RD)
            if kind == "hessian":
                loss_R = nn.functional.cross_entropy(logits_RV.to(dtype), labels_R[part], reduction="none")
                (grad_RD,) = torch.autograd.grad((loss_R * weights_R1[:, 0]).sum(), piece_RD, create_graph=True)
                (product_RD[part],) = torch.autograd.grad(grad_RD, piece_RD, jv_RD[part])
                continue
            u_RV = torch.zeros_like(logits_RV).requires_grad_()
            (jtu_RD,) = torch.autograd.grad(logits_RV, piece_RD, u_RV, create_graph=True)
            (jz_jv_RV,) = torch.autograd.grad(jtu_RD, u_RV, jv_RD[part], retain_graph=True)
        softmax_RV = logits_RV.detach().to(dtype).softmax(dim=-1)
        weighted_RV = weights_R1 * softmax_RV * jz_jv_RV.to(dtype)
        c_jz_jv_RV = weighted_RV - softmax_RV * weighted_RV.sum(dim=-1, keepdim=True)
        (product_RD[part],) = torch.autograd.grad(logits_RV, piece_RD, c_jz_jv_RV.to(logits_RV.dtype))
    return product_RD
