"""Embedding by the output layer: the gradient of the loss by a layer that is not there (METHOD 10, `output`).

Between the final hidden state h and the output head stands an imaginary D x D layer that is the identity. Its gradient is
Σ u hᵀ over the predicted tokens, with u = Wᵀr the residual r = softmax(logits) − onehot(token) taken back through the head, and
through whatever caps the logits. It takes one forward pass and no backward pass through the blocks, and is projected like the
gradients that it stands for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .backward import head_loss, over_predicted, predicted_tokens
from .batching import Progress, padded
from .causal_lm import accumulation_dtype, hidden_states, parameter_device, parameter_dtype
from .exact_gradients import in_pieces, plain_loss
from .projection import GradientProjection, plain_projection
from .samples import BoolArray, IntArray, Samples

LAYER = "output embedding"
"""The name by which the imaginary layer has its random signs."""


def output_embeddings(
    model: Any,
    samples: Samples,
    *,
    projection: GradientProjection,
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Embeddings (n, e) on the CPU, float32 (float64 from a float64 model), each row of unit length.

    e is the square of the hidden size, at most `projection.dim`. A sample without a predicted token has a zero row. Dropout is
    off; a row depends on its own sample only, beyond rounding. No more logits are held than `backward.LOGIT_BYTES`.

    Raises UnusableInput where samples do not fit the model and for families with an unknown output head;
    torch.OutOfMemoryError where one sample does not fit.
    """
    size = model.get_input_embeddings().weight.shape[1]
    dtype = accumulation_dtype(parameter_dtype(model))
    made = projection.layer(LAYER, size, size, dtype=dtype) if projection.reduces([(size, size)]) else None
    predicted_n = samples.predicted()
    embeddings_ne = torch.zeros(len(samples), size**2 if made is None else projection.dim, dtype=dtype)

    def run(indices: IntArray, counted: BoolArray, lengths: IntArray) -> None:
        nonlocal made
        ids_BT = padded(samples, indices, lengths, parameter_device(model))
        with torch.no_grad():
            hidden_BTD = hidden_states(model, model.base_model, ids_BT)
        row_R, before_R, labels_R, weights_R = predicted_tokens(samples, counted, indices, hidden_BTD.device)
        hidden_RD = hidden_BTD[row_R, before_R]
        _, grad_RD = head_loss(model, hidden_RD, labels_R, weights_R, backward=True)
        hidden_RD = hidden_RD.detach().to(dtype)
        if made is not None:
            made = made.to(hidden_RD)  # copies at the first batch only
            hidden_RD = made.project_input(hidden_RD)
        counts = predicted_n[indices]
        number_R = torch.from_numpy(np.concatenate([np.arange(count) for count in counts])).to(row_R.device)
        u_BTD, h_BTq = (_by_sample(values, row_R, number_R, counts) for values in (grad_RD, hidden_RD))
        for part, G_mDq in in_pieces(u_BTD, h_BTq, dtype):
            values_me = G_mDq.flatten(1) if made is None else made.fold(G_mDq)
            embeddings_ne[torch.from_numpy(indices[part])] = nn.functional.normalize(values_me, dim=1).cpu()

    over_predicted(model, samples, run, token_budget=token_budget, progress=progress)
    return embeddings_ne


def _by_sample(values_RD: Tensor, row_R: Tensor, number_R: Tensor, counts: IntArray) -> Tensor:
    """Of samples with so many positions (B,), one after the other, as (B, T, D); 0 beyond the positions that a sample has."""
    padded_BTD = values_RD.new_zeros(counts.size, int(counts.max()), values_RD.shape[1])
    padded_BTD[row_R, number_R] = values_RD
    return padded_BTD


def plain_output_embeddings(model: Any, samples: Samples, projection: GradientProjection) -> Tensor:
    """`output_embeddings` by autograd of an imaginary layer that is really put in front of the head, one sample at a time."""
    size = model.get_input_embeddings().weight.shape[1]
    dtype = accumulation_dtype(parameter_dtype(model))
    layer = nn.Parameter(torch.eye(size, dtype=parameter_dtype(model)))
    rows = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0] @ layer.T,))
    for i in range(len(samples)):
        loss = plain_loss(model, samples, i)
        G_DD = torch.zeros_like(layer) if loss is None else torch.autograd.grad(loss, layer)[0]
        rows.append(nn.functional.normalize(plain_projection({LAYER: G_DD.to(dtype)}, projection), dim=0))
    hook.remove()
    return torch.stack(rows)
