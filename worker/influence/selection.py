"""Choice of samples, and their weights, from influence (METHOD 1 and 5; arXiv 2505.19051, sections 3 and 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .errors import UnusableInput
from .samples import BoolArray, IntArray

FloatArray = npt.NDArray[np.floating[Any]]

_BLOCK_VALUES = 1 << 22  # of P read at once
_RANKED_VALUES = 1 << 22  # of P held, by rank, over all targets: longer lists are made less often


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FirstOrderWeights:
    """Weights w = max(0, (p - threshold) / ridge), float64 (n,), as many positive as the budget, summing to n.

    ridge: λ, and threshold: τ, of METHOD 1. Where the chosen samples cannot be told apart, ridge is 0, the limit.
    """

    weights: npt.NDArray[np.float64]
    ridge: float
    threshold: float


def top_k(p: Tensor | FloatArray, budget: int, eligible: npt.ArrayLike | None = None) -> IntArray:
    """Indices of the `budget` highest p (n,), best first, of equal ones the lower index first.

    eligible: bool (n,), the samples that may be chosen; None is all. Raises UnusableInput for p that is not finite where
    eligible and a budget above the number of eligible samples, ValueError for arrays of other shapes.
    """
    p_n = _array(p, "p", 1)
    candidates = _candidates(p_n, budget, eligible)
    leading = candidates[_leading(p_n[candidates], budget)]
    best: IntArray = leading[np.argsort(-p_n[leading], kind="stable")]
    return best


def round_robin(P: Tensor | FloatArray, budget: int, *, seed: int, eligible: npt.ArrayLike | None = None) -> IntArray:
    """Targets take turns, each taking its best sample not yet taken: P (n, t) -> indices (budget,) in the order taken.

    The order of the targets is drawn once from the seed and kept in every round. Of equal influence the lower index goes first.
    eligible and errors are as in `top_k`. P may be a memory map, or a view of one: it is read in blocks of rows, and the targets'
    lists hold no more than max(2 budget + 2 t, 4 million) entries together.
    """
    P_nt = _array(P, "P", 2)
    if not P_nt.shape[1]:
        raise ValueError("P has no targets")
    candidates = _candidates(P_nt, budget, eligible)
    order = turn_order(P_nt.shape[1], seed)
    ranked = [np.empty(0, dtype=np.int64)] * len(order)
    position = [0] * len(order)
    taken = np.zeros(P_nt.shape[0], dtype=bool)
    chosen = np.empty(budget, dtype=np.int64)
    for turn in range(budget):
        seat = turn % len(order)
        position[seat] = _next_free(ranked[seat], position[seat], taken)
        if position[seat] == ranked[seat].size:  # its list is used up: all targets look at what is left
            left = budget - turn
            count = max(2 * (left // len(order) + 1), min(left, _RANKED_VALUES // len(order)))
            ranked, position = _ranked(P_nt, candidates[~taken[candidates]], order, count), [0] * len(order)
        chosen[turn] = ranked[seat][position[seat]]
        taken[chosen[turn]] = True
    return chosen


def turn_order(targets: int, seed: int) -> IntArray:
    """The targets in the order of their turns: (t,)."""
    return np.random.Generator(np.random.Philox(seed)).permutation(targets)


def plain_round_robin(P_nt: FloatArray, budget: int, *, seed: int, eligible: BoolArray | None = None) -> list[int]:
    """What `round_robin` chooses: each target in turn scans all samples for its best one not yet taken."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(P_nt.shape[1])
    free = [i for i in range(len(P_nt)) if eligible is None or eligible[i]]
    chosen = []
    for turn in range(budget):
        target = order[turn % len(order)]
        chosen.append(max(free, key=lambda i: (P_nt[i, target], -i)))
        free.remove(chosen[-1])
    return chosen


def shortlist(
    P: Tensor | FloatArray,
    mean: Tensor | FloatArray,
    size: int,
    *,
    by_turns: bool,
    seed: int,
    eligible: npt.ArrayLike | None = None,
) -> IntArray:
    """Rising indices (size,) of the samples whose exact influence is worth computing, by propagated P (n, t) (METHOD 5, Refine).

    Those of the highest `mean` (n,) over targets; with `by_turns`, for a choice by round robin, half of them by turns: the mean
    is predicted better than a single target's influence (docs/decisions/0007-landmarks-and-embeddings.md).
    `eligible` and errors are as in `top_k`; landmarks are exact already and should not be eligible.
    """
    mask = np.ones(len(mean), dtype=bool) if eligible is None else np.array(eligible)
    turns = round_robin(P, size // 2, seed=seed, eligible=mask) if by_turns else np.empty(0, dtype=np.int64)
    mask[turns] = False
    return np.sort(np.concatenate([turns, top_k(mean, size - turns.size, eligible=mask)]))


def _next_free(ranked: IntArray, start: int, taken: BoolArray) -> int:
    """Where in the list, from `start` on, the first one not taken stands; its size where all are."""
    for near in range(start, ranked.size, 256):
        free = np.flatnonzero(~taken[ranked[near : near + 256]])
        if free.size:
            return near + int(free[0])
    return ranked.size


def _ranked(P_nt: FloatArray, rows: IntArray, targets: IntArray, count: int) -> list[IntArray]:
    """For each target the `count` best of the rows (ascending) of P, or all where they are fewer, best first."""
    tops: list[tuple[FloatArray, IntArray]] = [(np.empty(0, P_nt.dtype), np.empty(0, np.int64))] * len(targets)
    for start in range(0, rows.size, step := _block_rows(P_nt)):
        index = rows[start : start + step]
        block = P_nt[index]
        for seat, target in enumerate(targets):
            values, held = tops[seat]
            fresh = block[:, target]
            # Of equal values the lower index stays, so what comes later must be above all that is held of a full list.
            above = np.flatnonzero(fresh > values.min()) if held.size == count else slice(None)
            values, held = np.concatenate([values, fresh[above]]), np.concatenate([held, index[above]])
            kept = _leading(values, min(count, values.size))
            tops[seat] = values[kept], held[kept]
    return [held[np.argsort(-values, kind="stable")] for values, held in tops]


def _leading(p: FloatArray, count: int) -> IntArray:
    """Indices, ascending, of the `count` highest values, of equal ones the lower index first."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    smallest = np.partition(p, p.size - count)[p.size - count]
    above, equal = p > smallest, np.flatnonzero(p == smallest)
    above[equal[: count - int(above.sum())]] = True
    return np.flatnonzero(above)


def _block_rows(values: FloatArray) -> int:
    return max(1, _BLOCK_VALUES // max(1, math.prod(values.shape[1:])))


def first_order_weights(p: Tensor | FloatArray, budget: int) -> FirstOrderWeights:
    """Closed form of argmin -pᵀw + (λ/2) |w|², w >= 0, Σw = n, with λ such that exactly `budget` weights are positive.

    With p sorted downwards and k the budget, τ is p₍k₊₁₎, λ = Σ_{i≤k} (p_i - τ) / n and w_i = (p_i - τ) / λ (METHOD 1). Adding a
    constant to p changes nothing, so p may be all negative. Where that rule does not define the answer:
    * several samples equal to the k-th: the lower indices are kept and the others are treated as absent, so that τ is
      the highest value below the k-th;
    * nothing lies below the k-th (k = n, or only ties): τ is the k-th less the mean step (p_1 - p_k) / (k - 1);
    * all k equal and nothing below: equal weights n / k, λ = 0.

    p: (n,), budget: 1 to n. Raises ValueError for a budget outside of that, UnusableInput for p that is not finite.
    """
    p_n = _array(p, "p", 1).astype(np.float64)
    if not 1 <= budget <= p_n.size:
        raise ValueError(f"budget must be from 1 to the number of samples, {p_n.size}, not {budget}")
    kept = top_k(p_n, budget)
    lowest = p_n[kept[-1]]
    below = p_n[p_n < lowest]
    step = (p_n[kept[0]] - lowest) / max(budget - 1, 1)
    threshold = float(below.max() if below.size else lowest - step)
    gaps = p_n[kept] - threshold
    weights = np.zeros_like(p_n)
    weights[kept] = p_n.size * gaps / gaps.sum() if gaps.sum() > 0 else p_n.size / budget
    return FirstOrderWeights(weights=weights, ridge=float(gaps.sum() / p_n.size), threshold=threshold)


def mean_one_over_selected(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rescale weights (n,) so that the positive ones have mean 1 (METHOD 5); raises ValueError where none is positive."""
    selected = weights > 0
    if not selected.any():
        raise ValueError("no weight is positive, so nothing is selected")
    rescaled: npt.NDArray[np.float64] = weights * (selected.sum() / weights.sum())
    return rescaled


def _array(values: Tensor | FloatArray, name: str, ndim: int) -> FloatArray:
    array: FloatArray = values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, not shape {array.shape}")
    return array


def _candidates(values: FloatArray, budget: int, eligible: npt.ArrayLike | None) -> IntArray:
    """Indices of the eligible samples, checked: enough of them for the budget, all finite."""
    n = values.shape[0]
    mask = np.ones(n, dtype=bool) if eligible is None else np.asarray(eligible)
    if mask.dtype != np.bool_ or mask.shape != (n,):
        raise ValueError(f"eligible must be a bool array of shape ({n},), not {mask.dtype} of shape {mask.shape}")
    candidates = np.flatnonzero(mask)
    if not 0 <= budget <= candidates.size:
        raise UnusableInput(f"budget must be from 0 to the number of eligible samples, {candidates.size}, not {budget}")
    step, wrong_rows = _block_rows(values), [np.empty(0, dtype=np.int64)]
    for start in range(0, candidates.size, step):
        index = candidates[start : start + step]
        wrong_rows.append(index[~np.isfinite(values[index].reshape(index.size, -1)).all(axis=1)])
    wrong = np.concatenate(wrong_rows)
    if wrong.size:
        raise UnusableInput(f"influence is not finite for {wrong.size} samples, the first at {wrong[:5].tolist()}")
    return candidates
