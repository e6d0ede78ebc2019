"""The figures of a selection, against sums written out by hand."""

import math

import numpy as np
import pytest
import torch
from figures import figures, ndcg, spearman, turn

from worker.influence import round_robin

BELOW = -2.0  # below any cosine: cannot be chosen


def two_targets() -> torch.Tensor:
    return torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.7], [0.0, 0.6], [0.5, 0.5], [-0.3, -0.1]], dtype=torch.float64)


def test_the_exact_choice_has_one_in_every_figure() -> None:
    P = torch.randn(200, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert figures(P, P, 20, seed=3) == pytest.approx({"turn": 1, "top": 1, "overlap": 1, "ndcg": 1})


def test_a_choice_of_average_influence_has_zero() -> None:
    P = two_targets()
    P = torch.cat([P, P.mean(dim=0).expand(4, 2)])
    known = torch.full_like(P, BELOW)
    known[6:] = 0.0
    found = figures(P, known, 4, seed=0)
    assert (found["turn"], found["top"], found["ndcg"]) == pytest.approx((0, 0, 0), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_turn_counts_the_influence_on_the_target_whose_turn_it_was(seed: int) -> None:
    P = two_targets()
    mean = P.mean(dim=0)
    # Each target has two turns: of the exact choice its two best, here rows 0 and 1, and rows 2 and 3.
    best = (0.9 + 0.8 - 2 * mean[0]) + (0.7 + 0.6 - 2 * mean[1])
    known = torch.full_like(P, BELOW)
    known[[0, 2, 4, 5]] = P[[0, 2, 4, 5]]
    first = round_robin(known, 4, seed=seed)
    # The target that has the first turn takes row 4 in the third, and the other one is left with row 5.
    begins = 0 if first[0] == 0 else 1
    second = 1 - begins
    taken = P[0, 0] + P[2, 1] - mean.sum() + (P[4, begins] - mean[begins]) + (P[5, second] - mean[second])
    assert figures(P, known, 4, seed=seed)["turn"] == pytest.approx(float(taken / best))
    assert turn(P, first, seed) == pytest.approx(float(taken / best))


def test_a_choice_that_serves_one_target_alone_is_found_out() -> None:
    """Its mean influence is higher than the exact choice's, which is why the mean of round robin's choice is no figure."""
    P = torch.zeros(6, 2, dtype=torch.float64)
    P[:2, 0], P[2:4, 1], P[4:, :] = 1.0, 0.1, -0.5
    known = torch.full_like(P, BELOW)
    known[[0, 1]] = P[[0, 1]]
    exact, found = round_robin(P, 2, seed=0), round_robin(known, 2, seed=0)
    assert P.mean(dim=1)[found].sum() > P.mean(dim=1)[exact].sum()
    assert figures(P, known, 2, seed=0)["turn"] < 1
    assert figures(P, known, 2, seed=0)["top"] == pytest.approx(1)


def test_ndcg_discounts_by_rank() -> None:
    P = torch.tensor([[3.0], [2.0], [1.0], [-6.0]], dtype=torch.float64)  # the mean is 0: gains 3, 2, 1, 0
    known = torch.tensor([[0.0], [2.0], [1.0], [-1.0]], dtype=torch.float64)  # ranks row 1, then row 2
    ideal = 3 + 2 / math.log2(3)
    assert ndcg(P, known, 2) == pytest.approx((2 + 1 / math.log2(3)) / ideal)


def test_overlap_and_spearman() -> None:
    P = two_targets()
    known = P.clone()
    known[0] = known[1] = BELOW
    assert figures(P, known, 4, seed=0)["overlap"] == 0.5
    assert spearman(P, P.exp()) == pytest.approx(1)
    assert spearman(P, -P) == pytest.approx(-1)
    constant = torch.cat([P, torch.zeros(6, 1, dtype=torch.float64)], dim=1)
    assert spearman(constant, constant) == pytest.approx(1), "a target that is the same for all samples has none"
    assert np.isfinite(spearman(constant, constant))
