"""Batched forward and backward passes that hand each hooked layer's inputs and output gradients to a `Use` (METHOD 3).

No parameter requires a gradient, so the backward pass computes input gradients only, and the graph begins at the first hooked
layer. The layers may lie on different devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .batching import Progress, default_token_budget, marked_positions, padded, run_batches
from .causal_lm import (
    accumulation_dtype,
    check_head,
    check_samples,
    frozen,
    head_logits,
    hidden_states,
    parameter_device,
    parameter_dtype,
)
from .errors import UnusableInput
from .samples import BoolArray, IntArray, Samples, last_marked

LOGIT_BYTES = 64 * 2**20
"""Logits are made in pieces of about this size: whole batches of a large vocabulary would dominate memory."""


class Use:
    """What is done with the gradients of a batch's samples; a layer that runs twice in a pass is handed over twice.

    That of sample b in a layer is Σ_t δ_bt a_btᵀ, (O, I), with a the layer's input and δ the gradient of its output.
    """

    def start(self, samples_B: Tensor) -> None:
        """A batch of the samples of these indices begins. One that was started and not finished is void."""

    def save_input(self, layer: str, a_BTI: Tensor) -> Tensor:  # noqa: ARG002
        """What is saved of a layer's input (B, T, I) until its output gradient is there, (B, T, q); here all of it."""
        return a_BTI

    def on_output_grad(self, layer: str, saved_BTq: Tensor, delta_BTO: Tensor) -> None:
        """The output gradient (B, T, O) has come; `saved` is what `save_input` returned."""
        raise NotImplementedError

    def finish(self, samples_B: Tensor) -> None:
        """The batch is done."""


def over_samples(
    model: Any,
    samples: Samples,
    layers: Mapping[str, nn.Module],
    use: Use | None,
    *,
    skip_n: BoolArray | None = None,
    token_budget: int | None = None,
    progress: Progress | None = None,
    restart: Callable[[], None] | None = None,
) -> Tensor:
    """Pass every sample that has a predicted token through the model, in batches; the losses (n,) on the CPU.

    Without a `use` the backward pass is left out. `skip_n` marks samples that are not needed; their loss is 0, as without a
    predicted token. `restart`, where given, is called when a batch ran out of memory; all batches are then run again, smaller.
    Raises UnusableInput for samples that do not fit the model and families with an unknown output head.
    """
    loss_n = torch.zeros(len(samples), dtype=accumulation_dtype(parameter_dtype(model)))

    def run(indices: IntArray, counted: BoolArray, lengths: IntArray) -> None:
        where = torch.from_numpy(indices)
        if use is not None:
            use.start(where)
        loss_n[where] = _run_batch(model, layers, use, samples, counted, indices, lengths).cpu()
        if use is not None:
            use.finish(where)

    over_predicted(model, samples, run, skip_n=skip_n, token_budget=token_budget, progress=progress, restart=restart)
    return loss_n


def over_predicted(
    model: Any,
    samples: Samples,
    run: Callable[[IntArray, BoolArray, IntArray], None],
    *,
    skip_n: BoolArray | None = None,
    token_budget: int | None = None,
    progress: Progress | None = None,
    restart: Callable[[], None] | None = None,
) -> None:
    """Call `run` with each batch of the samples that have a predicted token, the model frozen: the samples' indices (B,), which
    tokens are predicted (N,), and how many tokens of every sample are needed (n,).

    The rest is as in `over_samples`.
    """
    check_samples(model, samples)
    with frozen(model):
        check_head(model)
        counted = samples.predictable()
        # The input needed ends before the last response token: what follows it has no influence on the loss.
        lengths = np.maximum(last_marked(counted, samples.offsets), 0)
        active = np.flatnonzero(lengths if skip_n is None else lengths * ~skip_n)
        budget = default_token_budget(parameter_device(model)) if token_budget is None else token_budget
        run_batches(lengths[active], budget, lambda batch: run(active[batch], counted, lengths), progress, restart)


def _run_batch(
    model: Any,
    layers: Mapping[str, nn.Module],
    use: Use | None,
    samples: Samples,
    counted: BoolArray,
    indices: IntArray,
    lengths: IntArray,
) -> Tensor:
    """Losses (B,) of one batch; where there is a use, every layer's gradients have been handed to it."""
    ids_BT = padded(samples, indices, lengths, parameter_device(model))
    handles = []
    if use is not None:
        hooks = {name: partial(_after_forward, use=use, layer=name, shape=ids_BT.shape) for name in layers}
        handles = [module.register_forward_hook(hooks[name]) for name, module in layers.items()]
    try:
        with torch.set_grad_enabled(use is not None):
            hidden_BTD = hidden_states(model, model.base_model, ids_BT)
    finally:
        for handle in handles:
            handle.remove()

    # Of the last block's device; the head may be elsewhere.
    row_R, before_R, labels_R, weights_R = predicted_tokens(samples, counted, indices, hidden_BTD.device)
    hidden_RD = hidden_BTD.detach()[row_R, before_R]
    loss_R, grad_RD = head_loss(model, hidden_RD, labels_R, weights_R, backward=use is not None)
    if use is not None:
        grad_BTD = torch.zeros_like(hidden_BTD)
        grad_BTD[row_R, before_R] = grad_RD
        torch.autograd.backward(hidden_BTD, grad_BTD)
    return loss_R.new_zeros(indices.size).index_add_(0, row_R, loss_R)


def predicted_tokens(
    samples: Samples, counted: BoolArray, indices: IntArray, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each predicted token of a batch: row, position before it, id, and 1 / the number of its sample's; each (R,)."""
    rows, positions = marked_positions(counted, samples, indices)
    labels = samples.input_ids[samples.offsets[indices][rows] + positions].astype(np.int64)
    weights = 1.0 / np.bincount(rows, minlength=indices.size)[rows]
    row_R, before_R, labels_R, weights_R = (
        torch.from_numpy(values).to(device) for values in (rows, positions - 1, labels, weights)
    )
    return row_R, before_R, labels_R, weights_R


def _after_forward(
    _: nn.Module, inputs: tuple[Tensor, ...], output_BTO: Tensor, *, use: Use, layer: str, shape: torch.Size
) -> Tensor:
    """Forward hook: keep the layer's input, and have its output gradient taken when the backward pass reaches it."""
    if inputs[0].shape[:2] != shape:
        raise UnusableInput(
            f"layer {layer} gets an input of shape {tuple(inputs[0].shape)}, not samples x tokens of {tuple(shape)}: "
            "choose other modules"
        )
    if not output_BTO.requires_grad:
        output_BTO.requires_grad_()  # the first hooked layer: the graph begins here
    saved_BTq = use.save_input(layer, inputs[0].detach())
    output_BTO.register_hook(partial(use.on_output_grad, layer, saved_BTq))
    return output_BTO


def logit_pieces(model: Any, count: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of so many positions whose logits (R, V) in `dtype` take about `LOGIT_BYTES`, at least one position each."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    step = max(LOGIT_BYTES // (vocabulary * dtype.itemsize), 1)
    for start in range(0, count, step):
        yield slice(start, start + step)


def head_loss(
    model: Any, hidden_RD: Tensor, labels_R: Tensor, weights_R: Tensor, *, backward: bool
) -> tuple[Tensor, Tensor]:
    """Weighted losses (R,), and their gradient (R, D) with respect to the hidden states, in pieces of bounded memory.

    Without `backward` the gradient is zero.
    """
    dtype = accumulation_dtype(hidden_RD.dtype)
    weights_R = weights_R.to(dtype)
    loss_R = torch.empty(hidden_RD.shape[0], dtype=dtype, device=hidden_RD.device)
    grad_RD = torch.zeros_like(hidden_RD)
    for part in logit_pieces(model, hidden_RD.shape[0], dtype):
        with torch.set_grad_enabled(backward):
            piece_RD = hidden_RD[part].requires_grad_(backward)
            logits_RV = head_logits(model, piece_RD).to(hidden_RD.device, dtype)
            piece_R = nn.functional.cross_entropy(logits_RV, labels_R[part], reduction="none") * weights_R[part]
        if backward:
            (grad_RD[part],) = torch.autograd.grad(piece_R.sum(), piece_RD)
        loss_R[part] = piece_R.detach()
    return loss_R, grad_RD
