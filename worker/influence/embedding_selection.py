"""Choice of the embedding by what the landmarks show of each candidate (METHOD 4, `auto`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .fidelity import fidelity
from .kernel_ridge import KernelChoice, KernelRidge

CLOSE = 0.01
"""How far below the best Spearman correlation a cheaper embedding may lie and still be taken."""


def embedding_candidates(
    blocks: int, total_blocks: int, *, with_output: bool = False
) -> list[tuple[dict[str, Any], float]]:
    """What `auto` compares on a model of `total_blocks` blocks, as an embedding's options, each with its cost, 1 being a forward
    pass through all blocks: the text alone, the state after the first `blocks` blocks (as many as the model has, where that is
    fewer), and both; and `output`, where a forward pass of the pool is affordable.

    The state is the mean over the reply: that of the last token alone fails where a chat template ends all replies alike. Deeper
    states and `jvp` are better by less than their cost buys in refinement (docs/decisions/0007-landmarks-and-embeddings.md).
    """
    run = min(blocks, total_blocks)
    costs = {"text": 0.0, "text_hidden": run / total_blocks, "hidden": run / total_blocks}
    if with_output:
        costs["output"] = 1.0
    return [({"kind": kind, "pooling": "response", "blocks": run}, cost) for kind, cost in costs.items()]


def select_embedding(
    embeddings: Sequence[Tensor],
    P_lt: Tensor,
    *,
    options: Sequence[Mapping[str, Any]],
    costs: Sequence[float],
    kernel: KernelChoice = "rbf",
    ridge: float | None = 0.01,
    bandwidth: float | None = None,
) -> tuple[int, list[dict[str, Any]]]:
    """The index of the embedding to use, and a table of all of them that can be written as JSON.

    Each candidate, embeddings (l, e) of the landmarks, is fitted to their exact influence (l, t), and judged by how well the mean
    over targets of a left-out landmark's influence is predicted. The cheapest whose Spearman correlation is within `CLOSE` of the
    best is taken, of equal costs the better one; where no candidate has a correlation (influence is constant), the cheapest. A
    table entry is the candidate's `options` with `cost`, `mean_spearman`, `mean_r2` (None where undefined) and `chosen`.

    Raises ValueError where there are no candidates, or not one set of options and one cost for each; and as `KernelRidge.fit`.
    """
    if not embeddings or not len(embeddings) == len(options) == len(costs):
        counts = f"{len(embeddings)}, {len(options)} and {len(costs)}"
        raise ValueError(f"each candidate needs embeddings, options and a cost: there are {counts}")
    found = []
    for E_le in embeddings:  # one fit at a time: each holds an (l, l) matrix
        fit = KernelRidge.fit(E_le, P_lt, kernel=kernel, ridge=ridge, bandwidth=bandwidth)
        found.append(fidelity(fit.P_lt, fit.leave_one_out()))
    scores = [-1.0 if one.mean_spearman is None else one.mean_spearman for one in found]
    close = [index for index, score in enumerate(scores) if score >= max(scores) - CLOSE]
    chosen = min(close, key=lambda index: (costs[index], -scores[index]))
    table = [
        {**named, "cost": cost, "mean_spearman": one.mean_spearman, "mean_r2": one.mean_r2, "chosen": index == chosen}
        for index, (named, cost, one) in enumerate(zip(options, costs, found, strict=True))
    ]
    return chosen, table
