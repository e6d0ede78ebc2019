"""Propagation of landmark influence by kernel ridge regression, and how good it is (METHOD 2; arXiv 2505.19051, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import UnusableInput

Kernel = Literal["rbf", "linear"]
Vector = npt.NDArray[np.float64]

ROWS = 1024
"""Rows of the kernel matrix K(S, L) that exist at a time; it is never stored whole."""

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""What a ridge that is not given is chosen among (docs/decisions/0007-landmarks-and-embeddings.md)."""


@dataclass(frozen=True, slots=True, eq=False)
class KernelRidge:
    """P = K(·, L) (K(L, L) + δI)⁻¹ P_L, one Cholesky factor for all targets. Made by `fit`; float64 inside.

    sigma: width of the Gaussian kernel, None for the linear one.  delta: ridge that was added to the diagonal.
    """

    sigma: float | None
    delta: float
    E_le: Tensor
    P_lt: Tensor
    coefficients_lt: Tensor
    cholesky_ll: Tensor

    @classmethod
    def fit(
        cls,
        E_le: Tensor,
        P_lt: Tensor,
        *,
        kernel: Kernel = "rbf",
        ridge: float | None = 0.01,
        bandwidth: float | None = None,
        targets: int | None = None,
    ) -> KernelRidge:
        """Fit landmark embeddings (l, e) to exact influence (l, t).

        kernel: `rbf`, exp(-|x - y|² / 2σ²), or `linear`, x·y.  bandwidth: σ; None is the median distance between landmarks that
        differ (1 where none do).  ridge: δ as a share of the mean of the kernel's diagonal; None takes that of `RIDGES` which
        predicts left-out landmarks best, each target counted in shares of its own variance.  targets: how many columns, from the
        first, are targets, whose ridge it is; others (products with curvature) are carried along. None is all.
        Raises ValueError for shapes and options that do not fit, UnusableInput for values that are not finite and a matrix
        that is singular because landmarks coincide while the ridge is 0.
        """
        E_le, P_lt = E_le.double(), P_lt.double()
        _check_fit(E_le, P_lt, kernel, ridge, bandwidth)
        if kernel == "rbf":
            squared_ll = _squared_distances(E_le, E_le)  # once, for the width and for the kernel: it is a large matrix
            sigma = _median_distance(squared_ll, E_le) if bandwidth is None else bandwidth
            K_ll = _gaussian(squared_ll, sigma).fill_diagonal_(1.0)
        else:
            sigma, K_ll = None, E_le @ E_le.T
        diagonal_l = K_ll.diagonal().clone()

        def fitted(share: float) -> KernelRidge:
            delta = share * float(diagonal_l.mean())
            K_ll.diagonal().copy_(diagonal_l + delta)
            cholesky_ll = _cholesky(K_ll, share)
            coefficients_lt = torch.cholesky_solve(P_lt, cholesky_ll)
            return cls(sigma, delta, E_le, P_lt, coefficients_lt, cholesky_ll)

        if ridge is not None:
            return fitted(ridge)
        return min(map(fitted, RIDGES), key=lambda one: _left_out_error(one, targets))

    def predict(self, E_me: Tensor) -> Tensor:
        """Propagated influence float64 (m, t) of samples with embeddings (m, e)."""
        if E_me.ndim != 2 or E_me.shape[1] != self.E_le.shape[1]:
            raise ValueError(f"embeddings must be (m, {self.E_le.shape[1]}), not {tuple(E_me.shape)}")
        P_mt = self.P_lt.new_empty(E_me.shape[0], self.P_lt.shape[1])
        for start in range(0, E_me.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            block_me = E_me[rows].to(self.E_le.device, torch.float64)
            torch.mm(_kernel(block_me, self.E_le, self.sigma), self.coefficients_lt, out=P_mt[rows])
        return P_mt

    def leave_one_out(self) -> Tensor:
        """What each landmark would be given if it were left out of the fit, float64 (l, t), σ and δ kept.

        P_ij - [A P_L]_ij / A_ii with A = (K + δI)⁻¹: no refitting.
        """
        inverse_ll = torch.cholesky_inverse(self.cholesky_ll)
        return self.P_lt - self.coefficients_lt / inverse_ll.diagonal()[:, None]


def plain_kernel_ridge(E_me: Tensor, E_le: Tensor, P_lt: Tensor, *, sigma: float | None, delta: float) -> Tensor:
    """What `KernelRidge.predict` gives, by the formula: one pair at a time, one general solve. float64 (m, t)."""

    def kernel(X: Tensor, Y: Tensor) -> Tensor:
        pair = (
            (lambda x, y: x @ y)
            if sigma is None
            else (lambda x, y: torch.exp(-(x - y).square().sum() / (2 * sigma**2)))
        )
        return torch.stack([torch.stack([pair(x, y) for y in Y]) for x in X])

    ridged_ll = kernel(E_le, E_le) + delta * torch.eye(len(E_le), dtype=torch.float64)
    coefficients_lt: Tensor = torch.linalg.solve(ridged_ll, P_lt)
    return kernel(E_me, E_le) @ coefficients_lt


def plain_leave_one_out(E_le: Tensor, P_lt: Tensor, *, sigma: float | None, delta: float) -> Tensor:
    """What `KernelRidge.leave_one_out` gives, by refitting without each landmark: float64 (l, t)."""
    rows = []
    for i in range(len(E_le)):
        rest = torch.arange(len(E_le)) != i
        rows.append(plain_kernel_ridge(E_le[i : i + 1], E_le[rest], P_lt[rest], sigma=sigma, delta=delta))
    return torch.cat(rows)


def _cholesky(K_ll: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of the kernel matrix with its ridge added; raises UnusableInput where that is singular."""
    cholesky_ll: Tensor
    cholesky_ll, failed = torch.linalg.cholesky_ex(K_ll)
    pivots_l = cholesky_ll.diagonal().square()
    smallest = torch.finfo(torch.float64).eps * len(K_ll) * float(K_ll.diagonal().max())
    if int(failed) or not bool((pivots_l > smallest).all()):
        raise UnusableInput(
            f"the kernel matrix of {len(K_ll)} landmarks is singular with ridge={ridge}: landmarks coincide or outnumber the "
            "embedding's dimensions; raise ridge"
        )
    return cholesky_ll


def _left_out_error(fitted: KernelRidge, targets: int | None) -> float:
    """Squared error where a landmark is left out, as a share of each target's variance; targets that vary, summed."""
    P_lt = fitted.P_lt[:, :targets]
    varying_t = (P_lt[:1] != P_lt).any(dim=0)
    error_lt = (P_lt - fitted.leave_one_out()[:, :targets])[:, varying_t]
    return float((error_lt.square().mean(dim=0) / P_lt[:, varying_t].var(dim=0, correction=0)).sum())


def _check_fit(E_le: Tensor, P_lt: Tensor, kernel: str, ridge: float | None, bandwidth: float | None) -> None:
    if E_le.ndim != 2 or P_lt.ndim != 2 or E_le.shape[0] != P_lt.shape[0] or not E_le.shape[0]:
        raise ValueError(f"landmarks must have (l, e) and (l, t), not {tuple(E_le.shape)} and {tuple(P_lt.shape)}")
    if kernel not in ("rbf", "linear"):
        raise ValueError(f"kernel must be rbf or linear, not {kernel!r}")
    if ridge is not None and ridge < 0:
        raise ValueError(f"ridge must not be negative, but is {ridge}")
    if bandwidth is not None and bandwidth <= 0:
        raise ValueError(f"bandwidth must be positive, not {bandwidth}")
    for what, values in (("embedding", E_le), ("influence", P_lt)):
        wrong = torch.nonzero(~torch.isfinite(values).all(dim=1)).flatten()
        if len(wrong):
            raise UnusableInput(
                f"the {what} of {len(wrong)} landmarks is not finite, the first at {wrong[:5].tolist()}"
            )


def _kernel(X_me: Tensor, Y_le: Tensor, sigma: float | None) -> Tensor:
    """Gaussian kernel of width sigma, the linear one without: (m, e), (l, e) -> (m, l)."""
    return X_me @ Y_le.T if sigma is None else _gaussian(_squared_distances(X_me, Y_le), sigma)


def _gaussian(squared_ml: Tensor, sigma: float) -> Tensor:
    """exp(-d² / 2σ²), in place."""
    return squared_ml.mul_(-0.5 / sigma**2).exp_()


def _squared_distances(X_me: Tensor, Y_le: Tensor) -> Tensor:
    norms_ml = X_me.square().sum(dim=1)[:, None] + Y_le.square().sum(dim=1)
    return norms_ml.addmm_(X_me, Y_le.T, alpha=-2.0).clamp_min_(0.0)


def _median_distance(squared_ll: Tensor, E_le: Tensor) -> float:
    """Median distance between landmarks that differ; that each pair is there twice leaves a median what it is."""
    # Below this a difference is the rounding of |x|² + |y|² - 2 x·y, not a distance.
    noise = 64 * torch.finfo(torch.float64).eps * float(E_le.square().sum(dim=1).max())
    squared = squared_ll.numpy(force=True)
    apart = squared[squared > noise]
    return float(np.sqrt(np.median(apart, overwrite_input=True))) if apart.size else 1.0


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
