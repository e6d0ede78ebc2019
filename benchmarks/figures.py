"""Figures of a selection beside the exact method's (METHOD 10). They are 1 for the exact choice and 0 for the pool's mean.

The mean influence of a choice by round robin can exceed the exact choice's, since round robin does not maximise it. `turn` counts
for each pick the influence on the target whose turn it was, and `top` judges a choice by the mean, which does maximise it.

Shape suffixes: m samples that could be chosen, t targets.
"""

import numpy as np
from torch import Tensor

from worker.influence import fidelity, round_robin, top_k
from worker.influence.promise import turns_gain
from worker.influence.samples import IntArray

Figures = dict[str, float]


def figures(P_mt: Tensor, known_mt: Tensor, budget: int, seed: int) -> Figures:
    """What a choice of `budget` samples by `known_mt` is worth by the exact influence `P_mt`, both float64 (m, t).

    `known_mt` ranks the samples: exact influence where it was computed, below any cosine where a sample cannot be chosen.
    The turns' order is drawn from the seed, as in the selection. `overlap` is the share of the exact choice that was found.
    """
    by_turns, best = (round_robin(each, budget, seed=seed) for each in (known_mt, P_mt))
    mean_m = P_mt.mean(dim=1)
    by_mean, highest = (top_k(each, budget) for each in (known_mt.mean(dim=1), mean_m))
    return {
        "turn": _gained(P_mt, by_turns, seed) / _gained(P_mt, best, seed),
        "top": float((mean_m[by_mean] - mean_m.mean()).sum() / (mean_m[highest] - mean_m.mean()).sum()),
        "overlap": len(np.intersect1d(by_turns, best)) / budget,
        "ndcg": ndcg(P_mt, known_mt, budget),
    }


def turn(P_mt: Tensor, chosen: IntArray, seed: int) -> float:
    """What a choice by round robin is worth, (budget,) in the order taken, as a share of the exact choice of that size."""
    return _gained(P_mt, chosen, seed) / _gained(P_mt, round_robin(P_mt, len(chosen), seed=seed), seed)


def _gained(P_mt: Tensor, chosen: IntArray, seed: int) -> float:
    return turns_gain(P_mt.numpy(force=True), chosen, seed, P_mt.mean(dim=0).numpy(force=True))


def ndcg(P_mt: Tensor, known_mt: Tensor, budget: int) -> float:
    """Normalised discounted cumulative gain at `budget`, as a mean over targets.

    A sample's gain is its exact influence above the pool's mean, 0 below it; the j-th of a ranking counts 1 / log2(j + 1).
    """
    gain_mt = (P_mt - P_mt.mean(dim=0)).clamp_min(0.0).numpy(force=True)
    discount = 1 / np.log2(np.arange(budget) + 2)
    found = []
    for gain_m, known_m in zip(gain_mt.T, known_mt.T, strict=True):
        ideal = discount @ np.sort(gain_m)[::-1][:budget]
        found.append(discount @ gain_m[top_k(known_m, budget)] / ideal if ideal > 0 else 1.0)
    return float(np.mean(found))


def spearman(P_mt: Tensor, predicted_mt: Tensor) -> float:
    """Rank correlation of predicted with exact influence, as a mean over the targets for which it is defined."""
    return float(np.mean([value for value in fidelity(P_mt, predicted_mt).spearman if value is not None]))
