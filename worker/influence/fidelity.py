"""How good propagated influence is: leave-one-out agreement with the exact influence of landmarks (METHOD 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Leave-one-out agreement of propagated with exact influence over the landmarks; None where a side is constant.

    r2, spearman: one figure a target.  mean_r2, mean_spearman: of the mean over targets.
    """

    r2: tuple[float | None, ...]
    spearman: tuple[float | None, ...]
    mean_r2: float | None
    mean_spearman: float | None


def fidelity(P_lt: Tensor, left_out_lt: Tensor) -> Fidelity:
    """Agreement of exact influence (l, t) with its leave-one-out prediction (l, t): R² and Spearman rank correlation."""
    if P_lt.ndim != 2 or P_lt.shape != left_out_lt.shape:
        raise ValueError(f"both must be (l, t), not {tuple(P_lt.shape)} and {tuple(left_out_lt.shape)}")
    exact_lt, predicted_lt = P_lt.double().numpy(force=True), left_out_lt.double().numpy(force=True)
    pairs = list(zip(exact_lt.T, predicted_lt.T, strict=True))
    mean = (exact_lt.mean(axis=1), predicted_lt.mean(axis=1)) if pairs else (np.zeros(0), np.zeros(0))
    return Fidelity(
        r2=tuple(_r2(*pair) for pair in pairs),
        spearman=tuple(_correlation(_ranks(a), _ranks(b)) for a, b in pairs),
        mean_r2=_r2(*mean),
        mean_spearman=_correlation(_ranks(mean[0]), _ranks(mean[1])),
    )


def _varies(x: Vector) -> bool:
    return bool(x.size) and bool(np.isfinite(x).all()) and bool((x != x[0]).any())


def _r2(exact: Vector, predicted: Vector) -> float | None:
    if not _varies(exact) or not np.isfinite(predicted).all():
        return None
    return float(1 - np.square(exact - predicted).sum() / np.square(exact - exact.mean()).sum())


def _ranks(x: Vector) -> Vector:
    """Ranks from 0, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def _correlation(x: Vector, y: Vector) -> float | None:
    if not _varies(x) or not _varies(y):
        return None
    dx, dy = x - x.mean(), y - y.mean()
    return float((dx @ dy) / np.sqrt((dx @ dx) * (dy @ dy)))
