"""One setting of the fidelity benchmark on one target: what is computed exactly, what is chosen, and how good that is.

The choice is made with the product's own functions, on influence that was measured beforehand. Landmarks take no part in it: at
the scale that the product is for they are 2 % of the pool, here many more, and would flatter.

Shape suffixes: n usable samples of the pool, m those that are no landmarks, l landmarks, t targets, e embedding size.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from figures import Figures, figures, spearman, turn
from torch import Tensor

from worker.influence import KernelRidge, Residuals, landmark_order, promise, round_robin, shortlist
from worker.influence.kernel_ridge import KernelChoice
from worker.influence.samples import BoolArray, IntArray

SELECTED = 0.05
"""The budget, as a share of the samples that are no landmarks."""
NEVER = -2.0
"""Below any cosine: a sample that cannot be chosen."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A method. landmarks: how many.  times: exact gradients beyond them, in multiples of the budget, in `rounds`; `until` ends
    them at that promise.  kernel, ridge: of the regression; None is by leave-one-out."""

    name: str
    embedding: str
    landmarks: int
    times: float
    rounds: int = 8
    until: float | None = None
    kernel: KernelChoice = "auto"
    ridge: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """figures: of the choice.  exact: landmarks and shortlist, rising rows.  times: the shortlist in multiples of the budget.
    promises: after each round, as soon as a whole budget is exact: (times so far, promised turn, true turn)."""

    figures: Figures
    exact: IntArray
    times: float
    promises: list[tuple[float, float, float]] = field(default_factory=list)


def without_model(P_nt: Tensor, known_nt: Tensor, seed: int) -> Outcome:
    """A choice by influence, or something in its place, that is known of every sample (n, t): no landmarks, nothing refined."""
    budget = budget_of(len(P_nt))
    found = figures(P_nt, known_nt, budget, seed) | {"spearman": spearman(P_nt, known_nt)}
    return Outcome(figures=found, exact=np.empty(0, np.int64), times=0.0)


def run(setting: Setting, E_ne: Tensor, P_nt: Tensor, seed: int, *, asks: bool = False) -> Outcome:
    """A setting with the landmarks of one seed; `asks` for the promise after each round, which `until` implies."""
    work = _Run(setting, E_ne, P_nt, seed)
    with TemporaryDirectory() as folder:
        while (size := work.next_round()) > 0:
            work.refine(size)
            if (asks or setting.until is not None) and work.promised(Path(folder)) >= (setting.until or 2.0):
                break
    return work.outcome()


def budget_of(count: int) -> int:
    return max(1, round(SELECTED * count))


class _Run:
    def __init__(self, setting: Setting, E_ne: Tensor, P_nt: Tensor, seed: int) -> None:
        self.setting, self.E_ne, self.P_nt, self.seed = setting, E_ne, P_nt, seed
        self.exact = np.sort(landmark_order(np.arange(len(P_nt)), choice="uniform", seed=seed)[: setting.landmarks])
        self.counted: BoolArray = np.ones(len(P_nt), dtype=bool)
        self.counted[self.exact] = False
        self.budget = budget_of(int(self.counted.sum()))
        self.most = min(math.floor(setting.times * self.budget), int(self.counted.sum()))
        self.promises: list[tuple[float, float, float]] = []
        self._fit()
        self.spearman = spearman(P_nt[self.counted], self.known_nt[self.counted])

    @property
    def refined(self) -> int:
        return len(self.exact) - self.setting.landmarks

    def next_round(self) -> int:
        """How many samples it computes, 0 after the last one."""
        return min(self.most - self.refined, math.ceil(self.most / self.setting.rounds))

    def refine(self, size: int) -> None:
        unknown = self.counted.copy()
        unknown[self.exact] = False
        mean_n = self.known_nt.mean(dim=1)
        chosen = shortlist(self.known_nt, mean_n, size, by_turns=True, seed=self.seed, eligible=unknown)
        self.exact = np.union1d(self.exact, chosen)
        self._fit()

    def _fit(self) -> None:
        """What is known of every sample: its exact influence, or the prediction from those."""
        E_le, P_lt = self.E_ne[self.exact], self.P_nt[self.exact]
        self.fit = KernelRidge.fit(E_le, P_lt, kernel=self.setting.kernel, ridge=self.setting.ridge)
        self.known_nt = self.fit.predict(self.E_ne)
        self.known_nt[self.exact] = P_lt

    def promised(self, folder: Path) -> float:
        """The promise of what is exact so far; 0 before that is a whole budget."""
        if self.refined < self.budget:
            return 0.0
        refined = np.zeros_like(self.counted)
        refined[self.exact] = True
        refined &= self.counted
        is_landmark = ~self.counted[self.exact]
        expected = promise(
            self.known_nt.float().numpy(),
            Residuals.of(self.fit.P_lt.numpy()[is_landmark], self.fit.leave_one_out().numpy()[is_landmark]),
            refined=refined,
            unknown=self.counted & ~refined,
            budget=self.budget,
            by_turns=True,
            seed=self.seed,
            folder=folder,
        )
        assert expected is not None  # None where the best selection gains nothing
        chosen = round_robin(self._scores(), self.budget, seed=self.seed)
        true = turn(self.P_nt[self.counted], chosen, self.seed)
        self.promises.append((self.refined / self.budget, expected, true))
        return expected

    def _scores(self) -> Tensor:
        """What the samples that are no landmarks are ranked by: exact influence, or predictions where none was refined."""
        if not self.refined:
            return self.known_nt[self.counted]
        scores_nt = torch.full_like(self.P_nt, NEVER)
        scores_nt[self.exact] = self.P_nt[self.exact]
        return scores_nt[self.counted]

    def outcome(self) -> Outcome:
        found = figures(self.P_nt[self.counted], self._scores(), self.budget, self.seed) | {"spearman": self.spearman}
        return Outcome(figures=found, exact=self.exact, times=self.refined / self.budget, promises=self.promises)
