"""Propagation of landmark influence by kernel ridge regression (METHOD 2; arXiv 2505.19051, section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import UnusableInput
from .kernels import (
    BY_DISTANCE,
    Kernel,
    kernel_matrix,
    median_distance,
    of_squared_distances,
    plain_kernel,
    squared_distances,
)

KernelChoice = Literal["auto", "rbf", "laplacian", "linear"]

ROWS = 1024
"""Rows of a kernel matrix K(S, L) that exist at a time; it is never stored whole."""

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""What a ridge that is not given is chosen among (docs/decisions/0007-landmarks-and-embeddings.md)."""

CHOSEN_ON = 2048
"""Landmarks on which a kernel and a ridge that are not given are chosen: enough to tell them apart, and each trial is cubic."""

JITTER = 1e-10
"""Added to the kernel matrix of centres, as a share of its mean diagonal: it must be regular where centres coincide."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelRidge:
    """Influence as a sum over landmarks, P = K(·, L) (K(L, L) + δI)⁻¹ P_L, or over some of them. Made by `fit`; float64 inside.

    kernel, ridge: those that were given or chosen.  sigma: width of the kernel, None for `linear`.  delta: the ridge times the
    mean of the kernel's diagonal.  centres: places among the landmarks of those that the sum is over, int64 (z,), all where the
    fit has no bound.  E_ze, coefficients_zt: their embeddings and coefficients.  left_out_lt: see `leave_one_out`.
    """

    kernel: Kernel
    ridge: float
    sigma: float | None
    delta: float
    centres: Tensor
    E_ze: Tensor
    coefficients_zt: Tensor
    P_lt: Tensor
    left_out_lt: Tensor

    @classmethod
    def fit(
        cls,
        E_le: Tensor,
        P_lt: Tensor,
        *,
        kernel: KernelChoice = "rbf",
        ridge: float | None = 0.01,
        bandwidth: float | None = None,
        targets: int | None = None,
        centres: int | None = None,
    ) -> KernelRidge:
        """Fit landmark embeddings (l, e) to exact influence (l, t).

        kernel: `rbf`, `laplacian` or `linear` (see `kernel_matrix`), or `auto`, the one of the first two that predicts left-out
        landmarks best.  ridge: δ as a share of the mean of the kernel's diagonal; None takes that of `RIDGES` which predicts
        left-out landmarks best. Both are chosen together, on at most `CHOSEN_ON` landmarks, each target counted in shares of its
        own variance.  bandwidth: σ; None is the median distance between centres that differ (1 where none do).  targets: how many
        columns, from the first, are targets, which choose; others (products with curvature) are carried along. None is all.
        centres: at most so many landmarks span the fit, evenly spread over their order; every landmark is fitted still (the
        Nyström approximation: Williams and Seeger 2001). Memory is then that of some matrices (z, z) instead of (l, l). None is
        all of them.

        Raises ValueError for shapes and options that do not fit, UnusableInput for values that are not finite and a matrix
        that is singular because landmarks coincide while the ridge is 0.
        """
        E_le, P_lt = E_le.double(), P_lt.double()
        _check_fit(E_le, P_lt, kernel, ridge, bandwidth, centres)
        kernels: Sequence[Kernel] = BY_DISTANCE if kernel == "auto" else (kernel,)
        ridges = RIDGES if ridge is None else (ridge,)
        is_whole = centres is None or centres >= len(E_le)
        if len(kernels) * len(ridges) > 1:
            some = _spread(len(E_le), CHOSEN_ON, E_le.device)
            tried = (fit for each in kernels for fit in _whole(E_le[some], P_lt[some], each, ridges, bandwidth))
            best = min(tried, key=lambda one: _left_out_error(one, targets))
            if is_whole and len(some) == len(E_le):
                return best
            kernels, ridges = (best.kernel,), (best.ridge,)
        if centres is None or is_whole:
            return next(_whole(E_le, P_lt, kernels[0], ridges, bandwidth))
        return _spanned(E_le, P_lt, kernels[0], ridges[0], bandwidth, centres)

    def predict(self, E_me: Tensor) -> Tensor:
        """Propagated influence float64 (m, t) of samples with embeddings (m, e)."""
        if E_me.ndim != 2 or E_me.shape[1] != self.E_ze.shape[1]:
            raise ValueError(f"embeddings must be (m, {self.E_ze.shape[1]}), not {tuple(E_me.shape)}")
        P_mt = self.P_lt.new_empty(E_me.shape[0], self.P_lt.shape[1])
        for start in range(0, E_me.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            block_me = E_me[rows].to(self.E_ze.device, torch.float64)
            torch.mm(kernel_matrix(self.kernel, block_me, self.E_ze, self.sigma), self.coefficients_zt, out=P_mt[rows])
        return P_mt

    def leave_one_out(self) -> Tensor:
        """What each landmark would be given if it were left out of the fit, float64 (l, t); σ, δ and the centres kept."""
        return self.left_out_lt


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """Places of at most so many landmarks, evenly spread, int64. They are in the order of the pool, whose sources lie one after
    the other: so each is met in proportion."""
    number = min(count, most)
    return torch.arange(number, device=device) * count // number


def _whole(
    E_le: Tensor, P_lt: Tensor, kernel: Kernel, ridges: Sequence[float], bandwidth: float | None
) -> Iterator[KernelRidge]:
    """A fit for each ridge, of which all landmarks are centres. With A = (K + δI)⁻¹ the coefficients are A P_L, and the residual
    of landmark i, were it left out, is [A P_L]_i / A_ii: no refitting."""
    K_ll, sigma = _kernel_of(kernel, E_le, bandwidth)
    diagonal_l = K_ll.diagonal().clone()
    for ridge in ridges:
        delta = ridge * float(diagonal_l.mean())
        K_ll.diagonal().copy_(diagonal_l + delta)
        cholesky_ll = _cholesky(K_ll, ridge)
        coefficients_lt = torch.cholesky_solve(P_lt, cholesky_ll)
        A_l = torch.cholesky_inverse(cholesky_ll).diagonal()
        yield KernelRidge(
            kernel=kernel,
            ridge=ridge,
            sigma=sigma,
            delta=delta,
            centres=torch.arange(len(E_le), device=E_le.device),
            E_ze=E_le,
            coefficients_zt=coefficients_lt,
            P_lt=P_lt,
            left_out_lt=P_lt - coefficients_lt / A_l[:, None],
        )


def _spanned(
    E_le: Tensor, P_lt: Tensor, kernel: Kernel, ridge: float, bandwidth: float | None, centres: int
) -> KernelRidge:
    """The fit that `centres` of the landmarks span: ridge regression on the features Φ = K(L, Z) R⁻ᵀ, R Rᵀ = K(Z, Z), so that
    Φ Φᵀ stands for K(L, L). With B Bᵀ = (ΦᵀΦ + δI)⁻¹ the prediction is Φ B Bᵀ Φᵀ P_L, and the residual of landmark i, were it
    left out, its residual divided by 1 - |Φ_i B|²: exact for this regression."""
    places_z = _spread(len(E_le), centres, E_le.device)
    E_ze = E_le[places_z]
    K_zz, sigma = _kernel_of(kernel, E_ze, bandwidth)
    mean = float(K_zz.diagonal().mean())
    K_zz.diagonal().add_(JITTER * mean)
    R_zz = _cholesky(K_zz, JITTER)

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(E_le), ROWS):
            rows = slice(start, start + ROWS)
            yield rows, kernel_matrix(kernel, E_le[rows], E_ze, sigma)

    gram_zz = torch.zeros_like(K_zz).fill_diagonal_(ridge * mean)
    moments_zt = P_lt.new_zeros(len(E_ze), P_lt.shape[1])
    for rows, K_mz in blocks():
        features_zm = torch.linalg.solve_triangular(R_zz, K_mz.T, upper=False)
        gram_zz.addmm_(features_zm, features_zm.T)
        moments_zt.addmm_(features_zm, P_lt[rows])
    cholesky_zz = _cholesky(gram_zz, ridge)
    coefficients_zt = torch.cholesky_solve(moments_zt, cholesky_zz)
    coefficients_zt = torch.linalg.solve_triangular(R_zz.T, coefficients_zt, upper=True)
    root_zz = R_zz @ cholesky_zz  # its inverse, times K(Z, L), is (Φ B)ᵀ
    left_out_lt = torch.empty_like(P_lt)
    for rows, K_mz in blocks():
        leverage_m = torch.linalg.solve_triangular(root_zz, K_mz.T, upper=False).square_().sum(dim=0)
        residual_mt = P_lt[rows] - K_mz @ coefficients_zt
        left_out_lt[rows] = P_lt[rows] - residual_mt / (1 - leverage_m)[:, None]
    return KernelRidge(
        kernel=kernel,
        ridge=ridge,
        sigma=sigma,
        delta=ridge * mean,
        centres=places_z,
        E_ze=E_ze,
        coefficients_zt=coefficients_zt,
        P_lt=P_lt,
        left_out_lt=left_out_lt,
    )


def plain_kernel_ridge(
    E_me: Tensor, E_le: Tensor, P_lt: Tensor, *, kernel: Kernel, sigma: float | None, delta: float
) -> Tensor:
    """What `KernelRidge.predict` gives, by the formula: one pair at a time, one general solve. float64 (m, t)."""
    ridged_ll = plain_kernel(kernel, E_le, E_le, sigma) + delta * torch.eye(len(E_le), dtype=torch.float64)
    coefficients_lt: Tensor = torch.linalg.solve(ridged_ll, P_lt)
    return plain_kernel(kernel, E_me, E_le, sigma) @ coefficients_lt


def plain_leave_one_out(E_le: Tensor, P_lt: Tensor, *, kernel: Kernel, sigma: float | None, delta: float) -> Tensor:
    """What `KernelRidge.leave_one_out` gives, by refitting without each landmark: float64 (l, t)."""
    rows = []
    for i in range(len(E_le)):
        rest = torch.arange(len(E_le)) != i
        own_1e = E_le[i : i + 1]
        rows.append(plain_kernel_ridge(own_1e, E_le[rest], P_lt[rest], kernel=kernel, sigma=sigma, delta=delta))
    return torch.cat(rows)


def plain_spanned(
    E_me: Tensor, E_le: Tensor, P_lt: Tensor, E_ze: Tensor, *, kernel: Kernel, sigma: float | None, delta: float
) -> Tensor:
    """What `KernelRidge.predict` gives of a fit that the centres (z, e) span: the α that minimise
    |P - K(L, Z) α|² + δ αᵀ K(Z, Z) α, by the normal equations. float64 (m, t)."""
    K_lz = plain_kernel(kernel, E_le, E_ze, sigma)
    normal_zz = K_lz.T @ K_lz + delta * plain_kernel(kernel, E_ze, E_ze, sigma)
    coefficients_zt: Tensor = torch.linalg.solve(normal_zz, K_lz.T @ P_lt)
    return plain_kernel(kernel, E_me, E_ze, sigma) @ coefficients_zt


def _kernel_of(kernel: Kernel, E_le: Tensor, bandwidth: float | None) -> tuple[Tensor, float | None]:
    """The kernel matrix of rows with themselves, and its width."""
    if kernel == "linear":
        return E_le @ E_le.T, None
    squared_ll = squared_distances(E_le, E_le)  # once, for the width and for the kernel: it is a large matrix
    sigma = median_distance(squared_ll) if bandwidth is None else bandwidth
    return of_squared_distances(kernel, squared_ll, sigma).fill_diagonal_(1.0), sigma


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
    error_lt = (P_lt - fitted.left_out_lt[:, :targets])[:, varying_t]
    return float((error_lt.square().mean(dim=0) / P_lt[:, varying_t].var(dim=0, correction=0)).sum())


def _check_fit(
    E_le: Tensor, P_lt: Tensor, kernel: str, ridge: float | None, bandwidth: float | None, centres: int | None
) -> None:
    if E_le.ndim != 2 or P_lt.ndim != 2 or E_le.shape[0] != P_lt.shape[0] or not E_le.shape[0]:
        raise ValueError(f"landmarks must have (l, e) and (l, t), not {tuple(E_le.shape)} and {tuple(P_lt.shape)}")
    if kernel not in ("auto", *BY_DISTANCE, "linear"):
        raise ValueError(f"kernel must be auto, rbf, laplacian or linear, not {kernel!r}")
    if ridge is not None and ridge < 0:
        raise ValueError(f"ridge must not be negative, but is {ridge}")
    if bandwidth is not None and bandwidth <= 0:
        raise ValueError(f"bandwidth must be positive, not {bandwidth}")
    if centres is not None and centres < 1:
        raise ValueError(f"centres must be at least 1, not {centres}")
    for what, values in (("embedding", E_le), ("influence", P_lt)):
        wrong = torch.nonzero(~torch.isfinite(values).all(dim=1)).flatten()
        if len(wrong):
            raise UnusableInput(
                f"the {what} of {len(wrong)} landmarks is not finite, the first at {wrong[:5].tolist()}"
            )
