"""What share of the best selection's influence a selection among exact samples is expected to have, before the rest is exact.

The truth about samples that are only predicted is simulated: each gets its prediction and the leave-one-out residuals, on all
targets together, of a landmark drawn at random, made as large as residuals are at such predictions (METHOD 10, "A promise
before it is paid"). What the best selection would gain there is compared with what the real one has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .samples import BoolArray, IntArray
from .selection import round_robin, top_k

Array = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]

DRAWS = 3
"""Simulated truths that a promise is the mean of."""

ROUNDING = 1e-3
"""A gain for each selected sample that is smaller than this share of the mean influence is rounding: the samples are alike."""

_ROWS = 4096
_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.96, 1.0)
"""Of the predictions, in rising order: between two of these, the size of residuals is measured."""
_FEWEST = 8
"""Residuals that a size is measured on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residuals:
    """Leave-one-out residuals `R_lt` (l, t) of exact samples, as multiples of the size that residuals have at their own
    predictions, and that size as a function of a prediction: `scale_t`, `centre_t`, `width_t` by target, and between `at_b` and
    `size_b`, by the prediction's distance from the centre in widths."""

    R_lt: Vector
    centre_t: Vector
    width_t: Vector
    scale_t: Vector
    at_b: Vector
    size_b: Vector

    @classmethod
    def of(cls, P_lt: Vector, left_out_lt: Vector) -> Residuals:
        """From exact influence (l, t) and what each sample is predicted when it is left out (l, t)."""
        R_lt = P_lt - left_out_lt
        centre_t = left_out_lt.mean(axis=0)
        width_t = _positive(left_out_lt.std(axis=0))
        scale_t = _positive(np.sqrt(np.square(R_lt).mean(axis=0)))
        z = ((left_out_lt - centre_t) / width_t).ravel()
        squares = np.square(R_lt / scale_t).ravel()[order := np.argsort(z, kind="stable")]
        edges = np.unique(np.round(np.array(_SHARES) * z.size).astype(int))
        while len(edges) > 2 and np.diff(edges).min() < _FEWEST:
            edges = np.delete(edges, max(1, int(np.diff(edges).argmin())))
        bounds = list(itertools.pairwise(edges))
        at_b = np.array([z[order[a:b]].mean() for a, b in bounds])
        size_b = _positive(np.array([np.sqrt(squares[a:b].mean()) for a, b in bounds]))
        sized = cls(R_lt=R_lt, centre_t=centre_t, width_t=width_t, scale_t=scale_t, at_b=at_b, size_b=size_b)
        return replace(sized, R_lt=R_lt / sized.size_at(left_out_lt))

    def size_at(self, predicted_mt: npt.NDArray[np.floating]) -> Vector:
        """The size of residuals at predictions (m, t)."""
        z_mt = (predicted_mt - self.centre_t) / self.width_t
        return np.asarray(np.interp(z_mt, self.at_b, self.size_b) * self.scale_t)


def _positive(values: Vector) -> Vector:
    return np.where(values > 0, values, 1.0)


def turns_gain(P_nt: Array, chosen: IntArray, seed: int, mean_t: Vector) -> float:
    """The influence on the target whose turn it was, beyond the mean, summed over what `round_robin` chose with the seed."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(P_nt.shape[1])
    targets = order[np.arange(len(chosen)) % len(order)]
    return float((P_nt[chosen, targets].astype(np.float64) - mean_t[targets]).sum())


def promise(
    P_nt: Array,
    residuals: Residuals,
    *,
    refined: BoolArray,
    unknown: BoolArray,
    budget: int,
    by_turns: bool,
    seed: int,
    folder: Path,
) -> float | None:
    """The expected gain of the best selection among the `refined`, as a share of that among them and the `unknown`.

    P_nt: float32 (n, t), maybe a memory map: exact where `refined`, bool (n,), predicted where `unknown`, bool (n,). Other
    samples (landmarks) are not counted: they would flatter. by_turns: the selection is made by `round_robin`, and the gain is
    on the target whose turn it is; else by `top_k`, and it is that of the mean over targets. budget: at most as many as are
    refined. folder: where a simulated truth of n x t values is kept while it is used.

    None where the best selection gains nothing beyond rounding.
    """
    counted = refined | unknown
    mean_t = _mean(P_nt, counted)
    nothing = ROUNDING * budget * float(np.abs(mean_t).mean())
    generator = np.random.Generator(np.random.Philox([seed, 0x9801]))
    shares = []
    for _ in range(DRAWS):
        simulated = np.lib.format.open_memmap(folder / "simulated.npy", "w+", np.float32, P_nt.shape)
        for rows, truth_mt in _simulated(P_nt, residuals, unknown, generator):
            simulated[rows] = truth_mt
        own = _gain(simulated, refined, budget, by_turns, seed, mean_t)
        best = _gain(simulated, counted, budget, by_turns, seed, mean_t)
        if best > nothing:
            shares.append(own / best)
        del simulated
    (folder / "simulated.npy").unlink()
    return float(np.mean(shares)) if shares else None


def _gain(P_nt: Array, eligible: BoolArray, budget: int, by_turns: bool, seed: int, mean_t: Vector) -> float:
    if by_turns:
        return turns_gain(P_nt, round_robin(P_nt, budget, seed=seed, eligible=eligible), seed, mean_t)
    blocks = [P_nt[rows].mean(axis=1, dtype=np.float64) for rows in _blocks(len(P_nt))]
    mean_n = np.concatenate(blocks)
    return float((mean_n[top_k(mean_n, budget, eligible=eligible)] - mean_t.mean()).sum())


def _simulated(
    P_nt: Array, residuals: Residuals, unknown: BoolArray, generator: np.random.Generator
) -> Iterator[tuple[slice, Array]]:
    for rows in _blocks(len(P_nt)):
        truth_mt = np.array(P_nt[rows])
        places = np.flatnonzero(unknown[rows])
        drawn = generator.integers(0, len(residuals.R_lt), size=len(places))
        truth_mt[places] += residuals.R_lt[drawn] * residuals.size_at(truth_mt[places])
        yield rows, truth_mt


def _mean(P_nt: Array, counted: BoolArray) -> Vector:
    sums = [P_nt[rows][counted[rows]].sum(axis=0, dtype=np.float64) for rows in _blocks(len(P_nt))]
    return np.asarray(np.sum(sums, axis=0) / max(int(counted.sum()), 1))


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, n)) for start in range(0, n, _ROWS))
