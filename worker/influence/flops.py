"""How many operations the stages need, and how many a second the machine can do (METHOD 3).

Only what the method needs is counted: matrix products, causal attention as half of its square, the output head on predicted
positions. Padding, norms and elementwise work are not, so that a share of the machine's rate shows what they cost.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .embeddings import POSITIONWISE, EmbeddingOptions, pooled_tokens
from .models import block_list, linear_layers, linear_size
from .projection import GradientProjection
from .samples import Samples, last_marked


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Floating-point operations by kind; a multiply-add is two."""

    linear: float
    attention: float
    head: float
    projection: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.head + self.projection


def _weights(module: Any) -> int:
    """Weights of the linear layers in a module."""
    sizes = [linear_size(layer) for layer in module.modules()]
    return sum(size[0] * size[1] for size in sizes if size is not None)


def _attention_width(model: Any) -> int:
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head * config.num_attention_heads)


def gradient_flops(
    model: Any,
    samples: Samples,
    *,
    modules: str = "down_proj",
    projection: GradientProjection | None,
    is_scaled_exactly: bool = False,
) -> Operations:
    """Operations of `per_sample_gradients`: 4 N T for the N block weights, less the backward before the first hooked layer.

    Scaled entry by entry, each gradient is first formed in full and then projected.
    """
    _, blocks = block_list(model.base_model)
    used_n = np.maximum(last_marked(samples.predictable(), samples.offsets), 0).astype(np.float64)
    tokens, squares = used_n.sum(), np.square(used_n).sum()
    layers = linear_layers(model, modules)
    first = int(next(iter(layers)).split(".")[1])
    forward = sum(_weights(block) for block in blocks)
    backward = sum(_weights(block) for block in blocks[first + 1 :])
    outer, sizes = 0.0, [linear_size(layer) or (0, 0) for layer in layers.values()]
    is_reduced = projection is not None and projection.reduces(sizes)
    for out_features, in_features in sizes:
        q = min(in_features, projection.directions) if projection is not None and is_reduced else in_features
        formed = in_features if is_scaled_exactly else q
        outer += 2 * tokens * out_features * formed
        if q < in_features:
            outer += 2 * in_features * q * (len(samples) * out_features if is_scaled_exactly else tokens)
    head = model.get_output_embeddings().weight.numel()
    # Forward: scores and values, 4 T^2 a head width, half of it causal; backward twice that.
    attention = 2 * squares * _attention_width(model) * (len(blocks) + 2 * len(blocks[first + 1 :]))
    return Operations(
        linear=2 * tokens * (forward + backward),
        attention=float(attention),
        head=4.0 * float(samples.predicted().sum()) * head,
        projection=float(outer),
    )


def embedding_passes(options: EmbeddingOptions, total_blocks: int) -> float:
    """What an embedding costs in forward passes through all blocks of the model: (1 + 2 k) b / B, for `rds` 1 (METHOD 3)."""
    share = 1.0 if options.kind == "rds" else options.blocks / total_blocks
    return share * (1 + 2 * options.tangents) if options.kind == "jvp" else share


def embedding_flops(model: Any, samples: Samples, *, options: EmbeddingOptions) -> Operations:
    """Operations of `embed`: 1 + 2 k forward passes of the first blocks, k = 0 for `hidden`; for `rds` one of all blocks.

    What is positionwise in the last block is counted at pooled positions only.
    """
    every = block_list(model.base_model)[1]
    blocks = every if options.kind == "rds" else every[: options.blocks]
    pooled_N = pooled_tokens(samples, options)
    lengths_n = (last_marked(pooled_N, samples.offsets) + 1).astype(np.float64)
    pooled = float(pooled_N.sum())
    passes = embedding_passes(options, len(every)) * len(every) / len(blocks)
    parts = [module for name, module in blocks[-1].named_modules() if name in POSITIONWISE]
    at_pooled = sum(_weights(part) for part in parts)
    everywhere = sum(_weights(block) for block in blocks) - at_pooled
    attention = 2 * np.square(lengths_n).sum() * _attention_width(model) * len(blocks)
    return Operations(
        linear=passes * 2 * (float(lengths_n.sum()) * everywhere + pooled * at_pooled),
        attention=float(passes * attention),
        head=0.0,
        projection=0.0,
    )


def measured_matmul_rate(
    dtype: torch.dtype, device: torch.device | str = "cpu", *, size: int = 2048, seconds: float = 0.5
) -> float:
    """Operations a second of a square matrix product, the best of those that fit in `seconds` (at least three)."""
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 3 or spent < seconds:
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        taken = time.perf_counter() - start
        best, spent, runs = min(best, taken), spent + taken, runs + 1
    return float(2 * size**3 / best)
