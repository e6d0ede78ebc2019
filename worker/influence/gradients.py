"""Exact per-sample gradients of the mean response cross-entropy, batched (METHOD 3; arXiv 2505.19051, section 3).

For a linear layer with input a and output gradient delta the gradient of sample b is sum_t delta_bt a_btT. Forward hooks keep
the projected inputs, gradient hooks on the outputs multiply them with the projected output gradients. No parameter requires
a gradient, so the backward pass computes input gradients only, and the graph begins at the first hooked layer.

Shape suffixes: n samples, k values a gradient, B samples of a batch, T tokens, D hidden size, R response positions,
O and I layer output and input, p and q their projected sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .batching import Progress, default_token_budget, marked_positions, padded, run_batches
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
from .projection import FactoredProjection, LayerProjection
from .samples import BoolArray, IntArray, Samples, last_marked

LOGIT_BYTES = 64 * 2**20
"""Logits are made in pieces of about this size: whole batches of a large vocabulary would dominate memory."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradients:
    """Per-sample gradients and losses, on the CPU, in the order of the samples.

    values: (n, k), float32 (float64 from a float64 model); layer after layer, each (p, q) or, unprojected, (O, I) row by row.
    loss: (n,), mean cross-entropy in nats of each sample's predicted response tokens, 0 where it has none.
    nonfinite: int64 indices of the samples whose gradient or loss is not finite.
    """

    values: Tensor
    loss: Tensor
    nonfinite: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """A hooked layer: its projection and the columns of the result that it fills."""

    module: nn.Module
    projection: LayerProjection
    columns: slice


def per_sample_gradients(
    model: Any,
    samples: Samples,
    *,
    modules: str = "down_proj",
    projection: FactoredProjection | None,
    token_budget: int | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> Gradients:
    """Gradients of each sample's loss with respect to the chosen weights, (n, k) (METHOD 3).

    The loss is the mean cross-entropy of the sample's predicted response tokens. Dropout is off whatever the model's mode. A
    result depends on its own sample only, beyond rounding: not on batch, padding or order. Samples without a predicted
    token have gradient 0 and loss 0. `modules` is the role `down_proj` or the end of a layer name; `projection=None` keeps
    all O x I values of each layer. `device` moves the model there first; None leaves it. `token_budget` bounds the padded tokens
    of a batch; None is a default for the device. `progress` is called after each batch.

    Raises ValueError for unknown modules, samples that do not fit the model, and families with an unknown output head;
    torch.OutOfMemoryError where one sample alone does not fit.
    """
    if device is not None:
        model.to(device)
    check_samples(model, samples)
    dtype = accumulation_dtype(parameter_dtype(model))
    with frozen(model):
        check_head(model)
        layers = _layers(model, modules, projection)
        counted = samples.predictable()
        # The input needed ends before the last response token: what follows it has no influence on the loss.
        lengths = np.maximum(last_marked(counted, samples.offsets), 0)
        values_nk = torch.zeros(len(samples), layers[-1].columns.stop, dtype=dtype)
        loss_n = torch.zeros(len(samples), dtype=dtype)
        active = np.flatnonzero(lengths)

        def run(batch: IntArray) -> None:
            indices = active[batch]
            gradients_Bk, loss_B = _batch_gradients(model, layers, samples, counted, indices, lengths)
            where = torch.from_numpy(indices)
            values_nk[where] = gradients_Bk.cpu()
            loss_n[where] = loss_B.cpu()

        budget = default_token_budget(parameter_device(model)) if token_budget is None else token_budget
        run_batches(lengths[active], budget, run, progress)
    finite_n = torch.isfinite(values_nk).all(dim=1) & torch.isfinite(loss_n)
    return Gradients(values=values_nk, loss=loss_n, nonfinite=torch.nonzero(~finite_n).flatten())


def _layers(model: Any, modules: str, projection: FactoredProjection | None) -> list[_Layer]:
    chosen = linear_layers(model, modules)
    dtype, device = parameter_dtype(model), parameter_device(model)
    layers: list[_Layer] = []
    start = 0
    for name, module in chosen.items():
        size = linear_size(module)
        assert size is not None
        p, q = size
        factors = LayerProjection(P_Op=None, P_Iq=None, scale=1.0)
        if projection is not None:
            p, q = projection.size(len(chosen), *size)
            factors = projection.layer(name, len(chosen), *size, dtype=dtype, device=device)
        layers.append(_Layer(module=module, projection=factors, columns=slice(start, start + p * q)))
        start += p * q
    return layers


def _batch_gradients(
    model: Any, layers: list[_Layer], samples: Samples, counted: BoolArray, indices: IntArray, lengths: IntArray
) -> tuple[Tensor, Tensor]:
    """Gradients (B, k) and losses (B,) of one batch, on the model's device."""
    device = parameter_device(model)
    ids_BT = padded(samples, indices, lengths, device)
    rows, positions = marked_positions(counted, samples, indices)
    labels_R = torch.from_numpy(samples.input_ids[samples.offsets[indices][rows] + positions].astype(np.int64)).to(
        device
    )
    weights_R = torch.from_numpy(1.0 / np.bincount(rows, minlength=indices.size)[rows]).to(device)
    row_R = torch.from_numpy(rows).to(device)
    before_R = torch.from_numpy(positions - 1).to(device)

    dtype = accumulation_dtype(parameter_dtype(model))
    gradients_Bk = torch.empty(indices.size, layers[-1].columns.stop, dtype=dtype, device=device)
    handles = [layer.module.register_forward_hook(_forward_hook(layer, gradients_Bk)) for layer in layers]
    try:
        with torch.enable_grad():
            hidden_BTD = hidden_states(model, model.base_model, ids_BT)
    finally:
        for handle in handles:
            handle.remove()
    loss_R, grad_RD = _head_gradient(model, hidden_BTD.detach()[row_R, before_R], labels_R, weights_R)
    grad_BTD = torch.zeros_like(hidden_BTD)
    grad_BTD[row_R, before_R] = grad_RD
    torch.autograd.backward(hidden_BTD, grad_BTD)
    loss_B = torch.zeros(indices.size, dtype=dtype, device=device).index_add_(0, row_R, loss_R)
    return gradients_Bk, loss_B


def _forward_hook(layer: _Layer, gradients_Bk: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output_BTO: Tensor) -> Tensor:
        if not output_BTO.requires_grad:
            output_BTO.requires_grad_()  # the first hooked layer: the graph begins here
        a_BTq = layer.projection.project_input(inputs[0].detach()).to(gradients_Bk.dtype)
        output_BTO.register_hook(partial(_outer_product, layer=layer, a_BTq=a_BTq, gradients_Bk=gradients_Bk))
        return output_BTO

    return hook


def _outer_product(delta_BTO: Tensor, *, layer: _Layer, a_BTq: Tensor, gradients_Bk: Tensor) -> None:
    """Write the projected gradient of one layer, accumulated over tokens in float32 or float64."""
    delta_BTp = layer.projection.project_output(delta_BTO).to(gradients_Bk.dtype)
    G_Bpq = torch.bmm(delta_BTp.mT, a_BTq)
    gradients_Bk[:, layer.columns] = G_Bpq.flatten(1) * layer.projection.scale


def _head_gradient(model: Any, hidden_RD: Tensor, labels_R: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted losses (R,) and their gradient (R, D) with respect to the hidden states, in pieces of bounded memory."""
    dtype = accumulation_dtype(hidden_RD.dtype)
    weights_R = weights_R.to(dtype)
    loss_R = torch.empty(hidden_RD.shape[0], dtype=dtype, device=hidden_RD.device)
    grad_RD = torch.empty_like(hidden_RD)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    step = max(LOGIT_BYTES // (vocabulary * dtype.itemsize), 1)
    for start in range(0, hidden_RD.shape[0], step):
        part = slice(start, start + step)
        with torch.enable_grad():
            piece_RD = hidden_RD[part].requires_grad_()
            logits_RV = head_logits(model, piece_RD).to(dtype)
            piece_R = nn.functional.cross_entropy(logits_RV, labels_R[part], reduction="none") * weights_R[part]
        (grad_RD[part],) = torch.autograd.grad(piece_R.sum(), piece_RD)
        loss_R[part] = piece_R.detach()
    return loss_R, grad_RD
