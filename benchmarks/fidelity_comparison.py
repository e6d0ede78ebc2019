"""Settings of the fidelity benchmarks beside the truth, on one model's measured data.

Shape suffixes: n usable samples of the pool, t samples of a target, e embedding size.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from fidelity_cost import FORWARD, GRADIENT, Measured, by_formula
from fidelity_methods import Setting, run, without_model
from fidelity_pool import Kinds, Pool
from torch import Tensor

from service.plan.landmark_count import landmark_count
from worker.influence import TextScales, landmark_order, text_embeddings
from worker.influence.samples import IntArray

CHOSEN_ON = ("gsm8k", "squad", "bbh")
CONFIRMED_ON = ("mmlu", "codex", "xquad")
PAPER_POOL = 200_000
TEXT, RDS = "text", "rds"
SCALED_ON = 1024
"""Samples, at most, that the scales of an embedding of tokens are measured on, as in the product."""
Point = dict[str, Any]


class Comparison:
    """Compares settings with the truth, on the measured data. Rows are those of the usable samples only."""

    def __init__(self, pool: Pool, kinds: Kinds, options: argparse.Namespace) -> None:
        self.pool, self.kinds, self.options = pool, kinds, options
        self.draws = options.draws
        self.n = pool.usable.size
        self.cost = Measured(pool, options.projection_dim)
        self.P = {name: P_nt[pool.usable] for name, P_nt in pool.influence.items()}
        self.E = {name: E_ne[pool.usable].double() for name, E_ne in pool.embeddings.items()}
        self.E[TEXT] = of_tokens(pool, options.seed).double()

    def described(self) -> dict[str, Any]:
        """What was measured, for a report."""
        return {
            **{name: getattr(self.options, name) for name in ("dtype", "max_length", "projection_dim", "draws")},
            "rows": len(self.pool.ids),
            "usable": self.n,
            "tokens": int(self.pool.samples.lengths.sum()),
            "targets": {name: P_nt.shape[1] for name, P_nt in self.P.items()},
            "ids": self.pool.ids,
        }

    def point(self, setting: Setting) -> Point:
        """The figures of a setting: means and standard deviations over draws of landmarks, by target and by group of targets."""
        embedding, E_ne = self.kinds.get(setting.embedding), self.E[setting.embedding]

        def one(target: str, seed: int) -> dict[str, float]:
            found = run(setting, E_ne, self.P[target], seed)
            ratio = self.cost.ratio(target, embedding, self.pool.usable[found.exact])
            formula = by_formula(embedding, landmarks=landmarks_of(PAPER_POOL), times=found.times)
            return {**found.figures, "times": found.times, "by_formula": formula, "measured": ratio}

        return {**asdict(setting), **self._means(one)}

    def beside(self, name: str, method: Callable[[str, int], dict[str, float]]) -> Point:
        return {"name": name, "embedding": "", "landmarks": 0, **self._means(method)}

    def rds_plus(self, target: str, seed: int) -> dict[str, float]:
        """RDS+: what stands in the place of influence is the cosine of embeddings."""
        E_te = self.pool.target_embeddings[target][RDS].double()
        known = without_model(self.P[target], self.E[RDS] @ E_te.T, seed)
        return {**known.figures, "times": 0.0, "by_formula": 1.0, "measured": 1.0}

    def other_signs(self, target: str, seed: int) -> dict[str, float]:
        """Exact influence, its gradients projected with other random signs: what no approximation can be better than."""
        found = without_model(self.P[target], self.pool.other[target][self.pool.usable], seed)
        everything = self.cost.ratio(target, None, np.arange(len(self.pool.ids)))
        return {**found.figures, "times": 0.0, "by_formula": FORWARD / GRADIENT, "measured": everything}

    def _means(self, one: Callable[[str, int], dict[str, float]]) -> dict[str, Any]:
        runs = {target: [one(target, seed) for seed in range(self.draws)] for target in self.P}
        names = list(next(iter(runs.values()))[0])
        values = {target: np.array([[each[name] for name in names] for each in of]) for target, of in runs.items()}

        def figures(targets: list[str]) -> dict[str, Any]:
            by_draw = np.mean([values[target] for target in targets], axis=0)  # (draws, figures)
            spread = by_draw.std(axis=0, ddof=1) if self.draws > 1 else np.zeros(len(names))
            found = {name: round(float(mean), 4) for name, mean in zip(names, by_draw.mean(axis=0), strict=True)}
            return {**found, "sd": {name: round(float(sd), 4) for name, sd in zip(names, spread, strict=True)}}

        return {
            "by_target": {target: figures([target]) for target in self.P},
            "by_group": {group: figures(targets) for group, targets in groups(list(self.P)).items()},
        }


def groups(targets: list[str]) -> dict[str, list[str]]:
    """The targets that the defaults were chosen on, and the others, which confirm them; without those that have none."""
    found = {
        "chosen": [target for target in targets if target in CHOSEN_ON],
        "confirmed": [target for target in targets if target not in CHOSEN_ON],
    }
    return {name: members for name, members in found.items() if members}


def of_tokens(pool: Pool, seed: int) -> Tensor:
    """The product's embedding of the usable samples' tokens, (n, e), as it keeps it: float16."""
    usable = pool.samples.take(pool.usable)
    return text_embeddings(usable, TextScales.of(usable.take(scaled_on(pool, seed)), seed)).half()


def scaled_on(pool: Pool, seed: int) -> IntArray:
    """Rows of the usable samples that the scales of an embedding are measured on."""
    return landmark_order(np.arange(pool.usable.size), choice="uniform", seed=seed)[:SCALED_ON]


def landmarks_of(usable: int) -> int:
    """The product's number of landmarks for a pool."""
    return landmark_count({"landmarks": {"count": None}}, usable)
