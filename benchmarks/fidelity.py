"""How well landmarks and cheap embeddings approximate exact influence, and at what share of the exact method's cost.

    python benchmarks/fidelity.py --corpus DIR --cache DIR [--out DIR]

The ground truth is exact influence on a random part of the pool. For every embedding, number and choice of landmarks and
refined share of the pool: Spearman correlation with the truth, overlap of the selected 5 % with the exact method's,
leave-one-out estimates and true values, and cost in operations and CPU seconds, as means over targets and draws of landmarks.
Measurements with the model are kept in the cache, so an interrupted run resumes. Only the targets' dev splits are read.

Shape suffixes: n usable samples of the pool, m those that are not landmarks, l landmarks, t targets, e embedding size.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, get_args

import numpy as np
import torch
from corpus import common_arguments
from fidelity_pool import Pool, measure
from fidelity_report import write_report
from measuring import heading
from torch import Tensor, nn

from worker.influence import KernelRidge, fidelity, landmark_order, round_robin, select_embedding, shortlist, top_k
from worker.influence.kernel_ridge import RIDGES
from worker.influence.landmarks import Choice
from worker.influence.samples import IntArray

SELECTED = 0.05
AUTO, JOINED = "auto", "hidden, all four"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point. `refine`: the share of the usable pool whose exact influence is computed after propagation, in `rounds`."""

    embedding: str
    landmarks: int
    choice: Choice = "uniform"
    refine: float = 0.2
    rounds: int = 1
    selection: str = "round_robin"
    ridge: float | None = None


def main() -> None:
    options = arguments()
    comparison = Comparison(measure(options), options)
    pool = comparison.pool
    report = {
        **heading(options),
        **{name: getattr(options, name) for name in ("dtype", "max_length", "projection_dim", "draws")},
        "rows": len(pool.ids),
        "usable": comparison.n,
        "tokens": int(pool.tokens.sum()),
        "targets": {name: P_nt.shape[1] for name, P_nt in pool.influence.items()},
        "selected_share": SELECTED,
        "ids": pool.ids,
        "exact": comparison.exact(),
        "embedding_share": {name: comparison.shares(np.empty(0, np.int64), name) for name in pool.embeddings},
        "projection": comparison.projections(),
        "points": [comparison.point(setting) for setting in grid(options, list(pool.embeddings))],
        "authors": comparison.point(authors(options, list(pool.embeddings))),
        "rounds": [comparison.point(each) for each in in_rounds(options)],
        "ridges": [comparison.point(each) for each in by_ridge(options)],
        "top_k": [comparison.point(replace(each, selection="top_k")) for each in by_mean(options)],
    }
    if options.out is not None:
        write_report(options.out, report)


def arguments() -> argparse.Namespace:
    parser = common_arguments(__doc__, rows=2000, targets=["gsm8k", "squad", "bbh"])
    parser.add_argument("--target-rows", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--projection-dim", type=int, default=16_384)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--draws", type=int, default=5, help="number of draws of landmarks, each with its own seed")
    parser.add_argument("--landmarks", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--refine", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3])
    return parser.parse_args()


def grid(options: argparse.Namespace, embeddings: list[str]) -> Iterator[Setting]:
    for embedding, count in itertools.product([*embeddings, JOINED, AUTO], options.landmarks):
        for choice, refine in itertools.product(get_args(Choice), options.refine):
            yield Setting(embedding=embedding, landmarks=count, choice=choice, refine=refine)


def authors(options: argparse.Namespace, embeddings: list[str]) -> Setting:
    """The setting of the paper's authors: JVP of the last token, 4 blocks, 2 tangents, ridge 0.01, no refinement."""
    jvp = next(name for name in embeddings if name.startswith("jvp") and name.endswith("last"))
    return Setting(embedding=jvp, landmarks=max(options.landmarks), refine=0.0, ridge=0.01)


def by_mean(options: argparse.Namespace) -> Iterator[Setting]:
    for count, refine in itertools.product(options.landmarks, options.refine):
        yield Setting(embedding=AUTO, landmarks=count, refine=refine)


def in_rounds(options: argparse.Namespace) -> Iterator[Setting]:
    refine = sorted(filter(None, options.refine))[-2:][0]
    for count, rounds in itertools.product(options.landmarks, (1, 4)):
        yield Setting(embedding=AUTO, landmarks=count, choice="stratified", refine=refine, rounds=rounds)


def by_ridge(options: argparse.Namespace) -> Iterator[Setting]:
    refine = sorted(filter(None, options.refine))[-2:][0]
    for count, ridge in itertools.product(options.landmarks, (*RIDGES, None)):
        yield Setting(embedding=AUTO, landmarks=count, refine=refine, ridge=ridge)


@dataclass(frozen=True, kw_only=True)
class Propagated:
    """One fit: the landmarks (l,) among the usable samples, and the known influence of all of them, (n, t): exact for landmarks,
    predicted for the others. `figures`: its quality. `embedding`: the one that was used."""

    landmarks: IntArray
    known_nt: Tensor
    figures: dict[str, float]
    embedding: str


class Comparison:
    """Compares settings with the truth, on the measured data. Rows are those of the usable samples only."""

    def __init__(self, pool: Pool, options: argparse.Namespace) -> None:
        self.pool, self.draws = pool, options.draws
        self.n = pool.usable.size
        self.budget = max(1, round(SELECTED * self.n))
        self.P = {name: P_nt[pool.usable] for name, P_nt in pool.influence.items()}
        self.E = {name: E_ne[pool.usable].double() for name, E_ne in pool.embeddings.items()}
        hidden = [E_ne for name, E_ne in self.E.items() if name.startswith("hidden")]
        self.E[JOINED] = nn.functional.normalize(torch.cat(hidden, dim=1), dim=1)
        self.sources = [pool.sources[i] for i in pool.usable]
        self.propagated = cache(self._propagated)

    def point(self, setting: Setting) -> dict[str, Any]:
        """The figures of a setting: means over targets and draws, their standard deviation over draws, and means by target."""
        found = {target: [self.one(setting, target, seed) for seed in range(self.draws)] for target in self.P}
        names = [name for name in found[next(iter(found))][0] if name != "embedding"]
        values = {name: np.array([[run[name] for run in runs] for runs in found.values()]) for name in names}
        used = [run["embedding"] for runs in found.values() for run in runs]
        return {
            **asdict(setting),
            **{name: round(float(value.mean()), 4) for name, value in values.items()},
            "sd": {name: round(float(value.mean(axis=0).std(ddof=1)), 4) for name, value in values.items()},
            "by_target": {
                target: {name: round(float(values[name][row].mean()), 4) for name in ("spearman", "overlap")}
                for row, target in enumerate(found)
            },
            **({"used": {name: used.count(name) for name in sorted(set(used))}} if setting.embedding == AUTO else {}),
        }

    def one(self, setting: Setting, target: str, seed: int) -> dict[str, Any]:
        """One target and one draw of landmarks."""
        P_nt = self.P[target]
        found = self.propagated(target, setting.embedding, setting.landmarks, setting.choice, setting.ridge, seed)
        exact, known_nt = found.landmarks, found.known_nt
        if setting.refine:
            exact = self.refined(setting, found, target, seed)
            known_nt = torch.full_like(P_nt, -2.0)  # below any cosine: only exact values are selected from
            known_nt[exact] = P_nt[exact]
        chosen = self.chosen(known_nt, setting.selection, seed)
        best = self.chosen(P_nt, setting.selection, seed)
        return {
            **found.figures,
            "overlap": len(np.intersect1d(chosen, best)) / self.budget,
            "captured": self.captured(P_nt, chosen, best),
            **self.shares(self.pool.usable[exact], found.embedding, setting.embedding, found.landmarks),
            "embedding": found.embedding,
        }

    def refined(self, setting: Setting, found: Propagated, target: str, seed: int) -> IntArray:
        """The landmarks and the shortlist, the latter in as many parts as there are rounds; before each but the first, the
        regression is refitted on everything that is exact by then."""
        exact, known_nt, P_nt = found.landmarks, found.known_nt, self.P[target]
        size = min(max(math.ceil(setting.refine * self.n), self.budget), self.n - len(exact))
        for part in np.array_split(np.arange(size), setting.rounds):
            if len(exact) > len(found.landmarks):
                known_nt = self.predicted(self.E[found.embedding], P_nt, exact, setting.ridge)[1]
            others = np.ones(self.n, dtype=bool)
            others[exact] = False
            by_turns, mean_n = setting.selection == "round_robin", known_nt.mean(dim=1)
            chosen = shortlist(known_nt, mean_n, len(part), by_turns=by_turns, seed=seed, eligible=others)
            exact = np.union1d(exact, chosen)
        return exact

    def chosen(self, P_nt: Tensor, selection: str, seed: int) -> IntArray:
        if selection == "top_k":
            return top_k(P_nt.mean(dim=1), self.budget)
        return round_robin(P_nt, self.budget, seed=seed)

    def captured(self, P_nt: Tensor, chosen: IntArray, best: IntArray) -> float:
        """Mean influence of the selection, scaled so that the pool has 0 and the exact method's selection 1."""
        mean_n = P_nt.mean(dim=1)
        return float((mean_n[chosen].mean() - mean_n.mean()) / (mean_n[best].mean() - mean_n.mean()))

    def _propagated(
        self, target: str, embedding: str, count: int, choice: Choice, ridge: float | None, seed: int
    ) -> Propagated:
        order = landmark_order(np.arange(self.n), choice=choice, seed=seed, sources=self.sources)
        landmarks = order[:count]
        P_nt = self.P[target]
        if embedding == AUTO:
            embedding = self._auto(target, landmarks)
        fitted, known_nt = self.predicted(self.E[embedding], P_nt, landmarks, ridge)
        others = np.setdiff1d(np.arange(self.n), landmarks)
        true, left_out = fidelity(P_nt[others], known_nt[others]), fidelity(P_nt[landmarks], fitted.leave_one_out())
        figures = {
            "spearman": float(np.mean([value for value in true.spearman if value is not None])),
            "mean_spearman": true.mean_spearman or 0.0,
            "mean_r2": true.mean_r2 or 0.0,
            "left_out_spearman": left_out.mean_spearman or 0.0,
            "left_out_r2": left_out.mean_r2 or 0.0,
        }
        return Propagated(landmarks=landmarks, known_nt=known_nt, figures=figures, embedding=embedding)

    def predicted(self, E_ne: Tensor, P_nt: Tensor, exact: IntArray, ridge: float | None) -> tuple[KernelRidge, Tensor]:
        """The fit to the exact influence, and the influence of every sample then known, (n, t)."""
        fitted = KernelRidge.fit(E_ne[exact], P_nt[exact], ridge=ridge)
        others = np.setdiff1d(np.arange(self.n), exact)
        known_nt = P_nt.clone()
        known_nt[others] = fitted.predict(E_ne[others])
        return fitted, known_nt

    def _auto(self, target: str, landmarks: IntArray) -> str:
        names = self.offered()
        costs = [self._operations(name) for name in names]
        options = [{"name": name} for name in names]
        offered = [self.E[name][landmarks] for name in names]
        index, _ = select_embedding(offered, self.P[target][landmarks], options=options, costs=costs, ridge=None)
        return names[index]

    def offered(self) -> list[str]:
        """The candidates of the product's `auto`: the state after the first blocks in both poolings."""
        return [name for name in self.pool.embeddings if name.startswith("hidden")][:2]

    def _operations(self, name: str) -> float:
        return float(self.pool.cost[name].operations_n.sum())

    def shares(
        self, exact: IntArray, embedding: str, asked: str = "", landmarks: IntArray | None = None
    ) -> dict[str, float]:
        """Cost as a share of the exact method's: the embedding of the pool, the gradients of the targets and of `exact` (rows of
        the whole pool); for `auto` also the other candidates' embeddings of the landmarks."""
        parts = (
            [name for name in self.pool.embeddings if name.startswith("hidden")] if embedding == JOINED else [embedding]
        )
        gradients = self.pool.cost["gradients"]
        share = gradients.operations_n[exact].sum() / gradients.operations_n.sum()
        operations = share * gradients.operations_n.sum() + sum(self._operations(name) for name in parts)
        seconds = share * gradients.seconds + sum(self.pool.cost[name].seconds for name in parts)
        if asked == AUTO and landmarks is not None:
            for name in self.offered():
                of_name = self.pool.cost[name]
                here = of_name.operations_n[self.pool.usable[landmarks]].sum()
                operations += here
                seconds += of_name.seconds * here / of_name.operations_n.sum()
        target = np.array(list(self.pool.target_cost.values())).mean(axis=0) if len(exact) else np.zeros(2)
        whole = self.exact()
        return {
            "operations_share": float((operations + target[0]) / whole["operations"]),
            "seconds_share": float((seconds + target[1]) / whole["seconds"]),
        }

    def exact(self) -> dict[str, float]:
        """Cost of the exact method for one target, as a mean over targets."""
        target = np.array(list(self.pool.target_cost.values())).mean(axis=0)
        gradients = self.pool.cost["gradients"]
        return {
            "operations": float(gradients.operations_n.sum() + target[0]),
            "seconds": float(gradients.seconds + target[1]),
        }

    def projections(self) -> dict[str, dict[str, float]]:
        """How far the exact method agrees with itself under another projection of the same or four times the size."""
        found = {}
        for name, influence in (("other signs", self.pool.other), ("four times the size", self.pool.finer)):
            figures = []
            for target, P_nt in self.P.items():
                Q_nt = influence[target][self.pool.usable]
                agreed = [value for value in fidelity(P_nt, Q_nt).spearman if value is not None]
                for seed in range(self.draws):
                    chosen, other = (self.chosen(each, "round_robin", seed) for each in (P_nt, Q_nt))
                    figures.append((np.mean(agreed), len(np.intersect1d(chosen, other)) / self.budget))
            spearman, overlap = np.array(figures).mean(axis=0)
            found[name] = {"spearman": round(float(spearman), 4), "overlap": round(float(overlap), 4)}
        return found


if __name__ == "__main__":
    main()
