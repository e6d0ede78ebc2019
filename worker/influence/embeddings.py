"""Cheap sample embeddings: JVP and hidden states of the first blocks, RDS+ (METHOD 4; arXiv 2505.19051, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from .batching import Progress, default_token_budget, marked_positions, padded, run_batches
from .causal_lm import accumulation_dtype, block_list, check_samples, first_blocks, frozen, hidden_states
from .causal_lm import parameter_device as device_of
from .causal_lm import parameter_dtype as dtype_of
from .errors import UnusableInput
from .forward_mode import check_forward_mode, forward_mode, random_tangents, replaced_forward
from .output_embedding import output_embeddings
from .projection import GradientProjection, seeded_generator
from .samples import BoolArray, IntArray, Samples, last_marked

FloatArray = npt.NDArray[np.float64]

POSITIONWISE = ("mlp", "self_attn.q_proj", "self_attn.o_proj", "attn.c_proj", "attention.dense")
"""Parts of a block whose output at one position matters to no other position of the same block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOptions:
    """How to embed (METHOD 4).

    kind: `jvp`, the derivative of the block-b hidden state along random directions in the first b blocks' parameters;
        `hidden`, that state itself; or `rds`, the last block's state, averaged over all tokens of the sample, the t-th of them
        with weight t (Ivison et al., arXiv 2503.01807); all after the model's final norm. `output`: the gradient of an imaginary
        layer before the output head (output_embedding.py).
    pooling: `last` token, or mean over the `response` tokens; `rds` and `output` have their own.
    blocks: how many blocks are run, for `rds` and `output` all of them.  tangents: how many directions, of `jvp` alone.
    seed: of the directions and of the reduction.
    max_dim: longer embeddings are reduced to this size by a seeded random projection.
    """

    kind: Literal["jvp", "hidden", "rds", "output"] = "jvp"
    pooling: Literal["last", "response"] = "response"
    blocks: int = 4
    tangents: int = 2
    seed: int = 0
    max_dim: int = 4096

    def __post_init__(self) -> None:
        if self.kind not in ("jvp", "hidden", "rds", "output"):
            raise ValueError(f"kind must be jvp, hidden, rds or output, not {self.kind!r}")
        if self.pooling not in ("last", "response"):
            raise ValueError(f"pooling must be last or response, not {self.pooling!r}")
        for name in ("blocks", "tangents", "max_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def embed(
    model: Any,
    samples: Samples,
    *,
    options: EmbeddingOptions,
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Embeddings (n, e) on the CPU, float32 (float64 from a float64 model), each row of unit length (METHOD 4).

    e is the hidden size, times the tangents for `jvp`, squared for `output`, at most `max_dim`. A sample with nothing to
    pool (no token, no response token under `response`, none that is predicted for `output`) has a zero row. Dropout is off; a
    row depends on its own sample only, beyond rounding. `token_budget` bounds the padded tokens of a batch; None is a default
    for the device. `progress` is called after each batch.

    Raises UnusableInput where `blocks` exceeds the model's layers; where samples do not fit the model; for `output`, where the
    family's output head is unknown; for `jvp`, where the derivative of a part of the architecture is not known or weights are
    quantised. Raises torch.OutOfMemoryError where one sample does not fit.
    """
    if options.kind == "output":
        projection = GradientProjection(dim=options.max_dim, seed=options.seed)
        return output_embeddings(model, samples, projection=projection, token_budget=token_budget, progress=progress)
    check_samples(model, samples)
    total = len(block_list(model.base_model)[1])
    base = first_blocks(model.base_model, total if options.kind == "rds" else options.blocks)
    pooled = pooled_tokens(samples, options)
    lengths = last_marked(pooled, samples.offsets) + 1
    active = np.flatnonzero(lengths)
    streams = options.tangents if options.kind == "jvp" else 1
    size = streams * model.get_input_embeddings().weight.shape[1]
    device = device_of(model)  # of the inputs; the blocks may be on others
    reduction_eE = _reduction(size, options, dtype_of(model), device)
    dtype = accumulation_dtype(dtype_of(model))
    embeddings_ne = torch.zeros(len(samples), min(size, options.max_dim), dtype=dtype)

    with torch.no_grad(), frozen(model), ExitStack() as stack:
        copies = 1
        if options.kind == "jvp":
            _check_differentiable(base, options.blocks)
            tangents = random_tangents(base, options.blocks, options.tangents, options.seed)
            check_forward_mode(model, base, tangents)
            stack.enter_context(forward_mode(base, tangents))
            copies = options.tangents + 1
        positions = stack.enter_context(_only_at_positions(base, copies))

        def run(batch: IntArray) -> None:
            indices = active[batch]
            ids_BT = padded(samples, indices, lengths, device)
            rows, places = marked_positions(pooled, samples, indices)
            positions(torch.from_numpy(rows * ids_BT.shape[1] + places).to(device))
            states_FTD = hidden_states(model, base, ids_BT)
            weights = (places + 1 if options.kind == "rds" else np.ones_like(places)).astype(np.float64)
            states_SND = states_FTD.view(copies, ids_BT.numel(), -1)
            pooled_BE = _pool(states_SND, ids_BT.shape, rows, places, weights).to(device)
            reduced_Be = pooled_BE if reduction_eE is None else pooled_BE @ reduction_eE.T
            embeddings_ne[torch.from_numpy(indices)] = nn.functional.normalize(reduced_Be, dim=1).cpu()

        budget = default_token_budget(device) if token_budget is None else token_budget
        run_batches(lengths[active], budget, run, progress)
    return embeddings_ne


def plain_state(
    model: Any, samples: Samples, i: int, options: EmbeddingOptions
) -> Callable[[dict[str, Tensor]], Tensor] | None:
    """What is pooled of sample i alone, (D,), as a function of parameters of the base model; None where there is nothing."""
    total = len(block_list(model.base_model)[1])
    base = first_blocks(model.base_model, total if options.kind == "rds" else options.blocks)
    one = samples.slice(i, i + 1)
    ids_1T = torch.from_numpy(one.input_ids.astype(np.int64)).to(device_of(model))[None]
    weight_T = torch.from_numpy(pooled_tokens(one, options).copy()).to(
        device_of(model), accumulation_dtype(dtype_of(model))
    )
    if options.kind == "rds":
        weight_T *= torch.arange(1, len(weight_T) + 1, device=weight_T.device)

    def state(values: dict[str, Tensor]) -> Tensor:
        hidden_TD: Tensor = functional_call(base, values, (ids_1T,), {"use_cache": False}).last_hidden_state[0]
        return weight_T @ hidden_TD.to(weight_T.dtype) / weight_T.sum()

    return state if weight_T.any() else None


def plain_embeddings(model: Any, samples: Samples, options: EmbeddingOptions) -> Tensor:
    """`embed` by a plain forward, or torch.func.jvp, of one sample and one direction at a time; without reduction to `max_dim`.

    The model is in eval mode, and its attention has a forward-mode derivative (`eager`).
    """
    base, streams = model.base_model, options.tangents if options.kind == "jvp" else 1
    tangents = random_tangents(base, options.blocks, options.tangents, options.seed) if options.kind == "jvp" else {}
    values = {name: parameter.detach() for name, parameter in base.named_parameters() if name in tangents}
    size = streams * model.get_input_embeddings().weight.shape[1]
    rows = torch.zeros(len(samples), size, dtype=accumulation_dtype(dtype_of(model)))
    for i in range(len(samples)):
        state = plain_state(model, samples, i, options)
        if state is None:
            continue
        along = [{name: tangent[j] for name, tangent in tangents.items()} for j in range(streams)]
        parts = [jvp(state, (values,), (v,))[1] for v in along] if tangents else [state({})]
        rows[i] = nn.functional.normalize(torch.cat(parts).detach(), dim=0).cpu()
    return rows


def _check_differentiable(base: Any, blocks: int) -> None:
    """Raise UnusableInput where the directions of `jvp` would be in parameters that are no floating-point numbers."""
    prefix, used = block_list(base)
    for name, parameter in used[:blocks].named_parameters(prefix):
        if not parameter.is_floating_point():
            raise UnusableInput(
                f"the jvp embedding has no derivative along quantised weights ({name} is {parameter.dtype}): use kind='hidden' "
                "or kind='rds', or load the model without quantisation"
            )


def pooled_tokens(samples: Samples, options: EmbeddingOptions) -> BoolArray:
    """The tokens whose hidden states are averaged, bool (N,)."""
    if options.kind == "rds":
        return np.ones_like(samples.response)
    if options.pooling == "response":
        return samples.response
    last = np.zeros_like(samples.response)
    last[samples.offsets[1:][samples.lengths > 0] - 1] = True
    return last


def _reduction(size: int, options: EmbeddingOptions, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Gaussian projection (e, E) of embeddings longer than `max_dim`, None for shorter ones."""
    if size <= options.max_dim:
        return None
    generator = seeded_generator(options.seed, "embedding reduction")
    values = generator.standard_normal((options.max_dim, size), dtype=np.float32)
    return torch.from_numpy(values).to(device, accumulation_dtype(dtype)) * float(options.max_dim**-0.5)


def _pool(states_SND: Tensor, shape: torch.Size, rows: IntArray, places: IntArray, weights: FloatArray) -> Tensor:
    """Weighted means over the pooled tokens (R,) of each sample of a batch, or of its tangents one after the other: (B, E)."""
    device, (count, tokens) = states_SND.device, shape
    shares = weights / np.bincount(rows, weights=weights, minlength=count)[rows]
    flat_R, row_R = (torch.from_numpy(index).to(device) for index in (rows * tokens + places, rows))
    # Of a stack, the first is the primal, which only a hidden state keeps.
    states_cRD = states_SND[min(len(states_SND) - 1, 1) :, flat_R].to(accumulation_dtype(states_SND.dtype))
    states_cRD *= torch.from_numpy(shares).to(device, states_cRD.dtype)[:, None]
    means_cBD = states_cRD.new_zeros(states_cRD.shape[0], count, states_cRD.shape[2]).index_add_(1, row_R, states_cRD)
    return means_cBD.transpose(0, 1).flatten(1)


@contextmanager
def _only_at_positions(base: Any, copies: int) -> Iterator[Callable[[Tensor], None]]:
    """In the last block, run what is positionwise at the pooled positions only; zero elsewhere, where nothing reads it.

    Yields a function that sets the positions (R,), as row * T + token of the batch to come.
    """
    current: list[Tensor] = []

    def positionwise(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x_FTD: Tensor) -> Tensor:
            x_SND = x_FTD.reshape(copies, -1, x_FTD.shape[-1])
            flat_R = current[0].to(x_FTD.device)
            y_SRO = inner(x_SND[:, flat_R])
            y_SNO = y_SRO.new_zeros(copies, x_SND.shape[1], y_SRO.shape[-1])
            y_SNO[:, flat_R] = y_SRO
            return y_SNO.view(*x_FTD.shape[:-1], -1)

        return forward

    def set_positions(flat_R: Tensor) -> None:
        current[:] = [flat_R]

    last = block_list(base)[1][-1]
    parts = {module: positionwise(module.forward) for name, module in last.named_modules() if name in POSITIONWISE}
    with replaced_forward(parts):
        yield set_positions
