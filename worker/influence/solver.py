"""The weights of second order: a convex quadratic programme over the samples, solved to rounding (METHOD 1, "The weights").

With F Fᵀ the form, F (n, s), the dual of  min -pᵀu + |Fᵀu|²/2 + ridge |u|²/2  over the simplex is
    D(y) = min over the simplex of (F y - p)ᵀu + ridge |u|²/2,  less |y|²/2,  for y (s),
concave and piecewise quadratic; its inner minimum is a projection. A semismooth Newton method on D needs systems of size s only
and ends after finitely many steps; docs/decisions/0006-solver.md compares it with accelerated projected gradient.

Inside, u = w / n lives on the unit simplex, p has its maximum taken off (that shifts the threshold only), and everything is
divided by `scale`: the spread of p plus the largest slope that the form can have on the simplex. So all numbers are of order one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import UnusableInput
from .samples import IntArray
from .selection import first_order_weights, top_k

Float64Array = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.floating[Any]]
Factors = tuple[FloatArray, FloatArray]

_BLOCK_VALUES = 1 << 22  # of B at once in float64: 32 MiB
_FLOOR = 1e-6  # the lowest ridge, times the budget, in the solver's units: weights keep ten digits
_TIE = 1e-9  # of the mean positive weight: what lies closer together is a tie
MAX_STEPS = 200  # of Newton's method at one ridge; a handful is usual


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightedSolution:
    """Weights float64 (n,), at least 0 and summing to n, and how good they are, computed from the weights alone.

    ridge, threshold: λ and τ of METHOD 1, in the units of p; support: the number of positive weights; objective: that of METHOD 1
    with the clipped form. iterations: Newton steps over all ridges that were tried. converged: whether Newton's method ended at
    its tolerance, not at `MAX_STEPS`; where it did not, the weights are its last point and the certificate says how good that is.
    clipped_eigenvalues, clipped_mass: the negative eigenvalues of B M Bᵀ, and their share of the sum of all absolute eigenvalues.
    restricted: no ridge gives the budget exactly, so samples were left out, and the certificate is that of the others' problem.
    kkt_residual: with g = p - ηQw - λw and τ the mean of g where w > 0, the largest of |g - τ| where w > 0 and of g - τ where
    w = 0, over scale = (max p - min p) + η n max diag Q; or |Σw / n - 1| where that is larger.
    duality_gap: objective less the dual bound at y = ηFᵀw, over n scale; never negative.
    """

    weights: Float64Array
    ridge: float
    threshold: float
    support: int
    kkt_residual: float
    duality_gap: float
    objective: float
    iterations: int
    converged: bool
    clipped_eigenvalues: int
    clipped_mass: float
    restricted: bool


def weighted_selection(
    p: npt.ArrayLike, *, budget: int, factors: Factors | None, learning_rate: float
) -> WeightedSolution:
    """argmin -pᵀw + (η/2) wᵀQw + (λ/2) |w|², w >= 0, Σw = n, with `budget` weights positive.

    Q is B M Bᵀ less its negative part. The ridge is the one at which sample budget + 1 is about to enter, as in
    `first_order_weights`, which answers where the form is zero. Where no ridge gives the budget (ties; or the form alone, with
    the ridge at its floor of 1e-6 budget scale / n, wants more samples), the problem is solved again for the `budget` highest
    weights only, of tied ones the lower index, with `restricted` set. A problem of as many samples as its budget takes the ridge
    that puts the lowest slope above τ by the mean step, (highest - lowest) / (budget - 1), or the floor where that is higher.

    p: (n,); factors: B (n, r), any floating dtype, may be a memory map (it is read in blocks of rows, never copied), and M (r, r)
    symmetric; None is first order; learning_rate: η. Memory: O(n + r²) beside the arguments. Raises UnusableInput for values
    that are not finite and a budget outside 1 to n, ValueError for shapes, an M that is not symmetric and a learning rate that is
    not positive.
    """
    p_n = np.asarray(p, dtype=np.float64)
    if p_n.ndim != 1 or not p_n.size or not np.isfinite(p_n).all():
        raise UnusableInput(f"p must be finite, of shape (n,) with n of 1 or more; its shape is {p_n.shape}")
    if not 1 <= budget <= p_n.size:
        raise UnusableInput(f"budget must be from 1 to the number of samples, {p_n.size}, not {budget}")
    if not (np.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate must be positive and finite, not {learning_rate}")
    B_nr, M_rr = _checked(factors, p_n.size)
    transform_rs, clipped, mass = _positive_part(B_nr, M_rr)
    pool, scale = _Pool.of(p_n, B_nr, transform_rs * np.sqrt(learning_rate * p_n.size))
    steps, converged = 0, True
    if transform_rs.shape[1]:
        pool, point = _second_order(pool, budget)
        u_n, ridge, steps, converged = point.u_n, point.ridge, point.steps, point.converged
    else:
        pool, u_n, ridge = _first_order(pool, budget)
    rows = np.arange(p_n.size) if pool.rows is None else pool.rows
    weights_n = np.zeros(p_n.size)
    weights_n[rows] = u_n * p_n.size
    tau, residual, gap, objective = _certificate(pool, u_n, ridge)
    return WeightedSolution(
        weights=weights_n,
        ridge=ridge * scale / p_n.size,
        threshold=tau * scale + float(p_n.max()),
        support=int((weights_n > 0).sum()),
        kkt_residual=residual,
        duality_gap=gap,
        objective=p_n.size * (scale * objective - float(p_n.max())),
        iterations=steps,
        converged=converged,
        clipped_eigenvalues=clipped,
        clipped_mass=mass,
        restricted=rows.size < p_n.size,
    )


def plain_certificate(
    p_n: Float64Array, Q_nn: Float64Array, w_n: Float64Array, *, ridge: float, learning_rate: float
) -> tuple[float, float]:
    """By their definitions, with the clipped form dense: `kkt_residual` times `scale`, but for the sum of w, and `objective`."""
    g_n = p_n - learning_rate * Q_nn @ w_n - ridge * w_n
    excess_n = g_n - g_n[w_n > 0].mean()
    residual = max(np.abs(excess_n[w_n > 0]).max(), excess_n[w_n == 0].max(initial=0.0))
    objective = -p_n @ w_n + learning_rate / 2 * w_n @ Q_nn @ w_n + ridge / 2 * w_n @ w_n
    return float(residual), float(objective)


def _checked(factors: Factors | None, n: int) -> tuple[FloatArray, Float64Array]:
    B_nr, M_rr = factors if factors is not None else (np.empty((n, 0)), np.empty((0, 0)))
    if B_nr.ndim != 2 or B_nr.shape[0] != n or M_rr.shape != (B_nr.shape[1], B_nr.shape[1]):
        raise ValueError(f"factors must be B (n, r) and M (r, r) with n = {n}, not {B_nr.shape} and {M_rr.shape}")
    if not np.isfinite(M_rr).all():
        raise UnusableInput("M of the factors is not finite")
    if np.abs(M_rr - M_rr.T).max(initial=0) > 1e-8 * np.abs(M_rr).max(initial=0):
        raise ValueError("M of the factors is not symmetric: pass (M + M.T) / 2")
    return B_nr, (M_rr.astype(np.float64) + M_rr.T) / 2


def _blocks(B_nr: FloatArray, rows: IntArray | None = None) -> Iterator[tuple[slice, Float64Array]]:
    """Rows of B, or the rows named, a block at a time in float64, each with its place among them."""
    count, step = len(B_nr) if rows is None else rows.size, max(1, _BLOCK_VALUES // max(1, B_nr.shape[1]))
    for start in range(0, count, step):
        place = slice(start, min(start + step, count))
        yield place, np.asarray(B_nr[place] if rows is None else B_nr[rows[place]], dtype=np.float64)


def _positive_part(B_nr: FloatArray, M_rr: Float64Array) -> tuple[Float64Array, int, float]:
    """(r, s) such that (B times it) (its transpose) is B M Bᵀ without its negative eigenvalues; their number and share.

    From the triangular factor of B = U R: B M Bᵀ = U (R M Rᵀ) Uᵀ has the eigenvalues of R M Rᵀ = V diag(e) Vᵀ, and
    U V = B M Rᵀ V / e, which needs neither U nor an inverse of R, so that B may be rank deficient.
    """
    R_rr: Float64Array = np.empty((0, len(M_rr)))
    for place, B_mr in _blocks(B_nr):
        if not np.isfinite(B_mr).all():
            wrong = place.start + np.flatnonzero(~np.isfinite(B_mr).all(axis=1))
            raise UnusableInput(f"B of the factors is not finite, first in row {wrong[0]}")
        R_rr = np.asarray(np.linalg.qr(np.vstack([R_rr, B_mr]), mode="r"))
    eigenvalues, V_rr = np.linalg.eigh(R_rr @ M_rr @ R_rr.T)
    noise = 8 * len(M_rr) * np.finfo(np.float64).eps * np.abs(eigenvalues).max(initial=0)
    negative, positive = eigenvalues < -noise, eigenvalues > noise
    total = np.abs(eigenvalues).sum()
    mass = float(np.abs(eigenvalues[negative]).sum() / total) if total else 0.0
    transform_rs = M_rr @ R_rr.T @ V_rr[:, positive] / np.sqrt(eigenvalues[positive])
    return transform_rs, int(negative.sum()), mass


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """The samples that may be chosen, in the units of the solver. F = B[rows] @ transform is never stored."""

    p_n: Float64Array
    B_nr: FloatArray
    transform_rs: Float64Array
    rows: IntArray | None = None  # of B; None is all

    @staticmethod
    def of(p_n: Float64Array, B_nr: FloatArray, transform_rs: Float64Array) -> tuple[_Pool, float]:
        """The pool and its scale."""
        with np.errstate(over="ignore"):
            largest = max((np.square(B_mr @ transform_rs).sum(axis=1).max() for _, B_mr in _blocks(B_nr)), default=0.0)
            scale = float(p_n.max() - p_n.min() + largest)
        if not np.isfinite(scale):
            raise UnusableInput("p, the factors and learning_rate are too large for float64")
        unit = scale or 1.0
        return _Pool((p_n - p_n.max()) / unit, B_nr, transform_rs / np.sqrt(unit)), unit

    def only(self, kept: IntArray) -> _Pool:
        return replace(self, p_n=self.p_n[kept], rows=kept)

    def times(self, y_s: Float64Array) -> Float64Array:
        """F y, (n,)."""
        product_n, y_r = np.empty(self.p_n.size), self.transform_rs @ y_s
        for place, B_mr in _blocks(self.B_nr, self.rows):
            product_n[place] = B_mr @ y_r
        return product_n

    def transposed_times(self, u_n: Float64Array) -> Float64Array:
        """Fᵀu, (s,), from the rows where u is not 0."""
        active = np.flatnonzero(u_n)
        sum_r = np.zeros(self.B_nr.shape[1])
        for place, B_mr in _blocks(self.B_nr, active if self.rows is None else self.rows[active]):
            sum_r += u_n[active[place]] @ B_mr
        product_s: Float64Array = self.transform_rs.T @ sum_r
        return product_s

    def scatter(self, active: IntArray) -> Float64Array:
        """Σ (f_i - f̄) (f_i - f̄)ᵀ over the active rows of F, (s, s)."""
        sums_r, products_rr = np.zeros(self.B_nr.shape[1]), np.zeros((self.B_nr.shape[1],) * 2)
        for _, B_mr in _blocks(self.B_nr, active if self.rows is None else self.rows[active]):
            sums_r += B_mr.sum(axis=0)
            products_rr += B_mr.T @ B_mr
        products_rr -= np.outer(sums_r, sums_r) / active.size
        scatter_ss: Float64Array = self.transform_rs.T @ products_rr @ self.transform_rs
        return scatter_ss


def _first_order(pool: _Pool, budget: int) -> tuple[_Pool, Float64Array, float]:
    """The closed form: without the samples that it leaves out of a tie, u, and the ridge."""
    n = pool.p_n.size
    closed = first_order_weights(pool.p_n, budget)
    chosen = closed.weights > 0
    inside = chosen | (pool.p_n < pool.p_n[chosen].min())
    if not inside.all():
        pool = pool.only(np.flatnonzero(inside))
    return pool, closed.weights[inside] / n, closed.ridge * n


def _second_order(pool: _Pool, budget: int) -> tuple[_Pool, _Point]:
    """The same by search over the ridge."""
    point = _search(pool, budget)
    if not point.meets(budget):
        # Rounded, so that equal samples stay equal whatever block of rows they were computed in.
        rounded_n = np.round(np.maximum(point.excess_n, 0) / (_TIE * point.ridge / budget))
        pool = pool.only(np.sort(top_k(rounded_n, budget)))
        point = _search(pool, budget, point.steps)
    return pool, point


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    """The maximum of the dual at one ridge: y (s,), and the slope p - F y less τ of each sample; steps: taken so far.

    converged: whether it is the maximum, to the tolerance.
    """

    ridge: float
    y_s: Float64Array
    excess_n: Float64Array
    steps: int
    converged: bool = False

    @property
    def u_n(self) -> Float64Array:
        u_n = np.maximum(self.excess_n, 0)
        u_n /= u_n.sum()
        return u_n

    def meets(self, budget: int) -> bool:
        """Whether exactly `budget` weights are positive, none of them by rounding alone."""
        positive = self.excess_n > 0
        lowest = self.excess_n.min(where=positive, initial=np.inf)
        return bool(positive.sum() == budget and lowest > _TIE * self.ridge / budget)

    def overshoot(self, budget: int) -> float:
        """Continuous in the ridge, and above 0 where the ridge is too high for the budget."""
        below = self.excess_n.size - budget
        if below:  # the best of the samples that must stay out
            return float(np.partition(self.excess_n, below - 1)[below - 1])
        return float(self.excess_n.min() - np.ptp(self.excess_n) / max(budget - 1, 1))


def _search(pool: _Pool, budget: int, steps: int = 0) -> _Point:
    """The point where the overshoot crosses 0: below the crossing, or above it where the one below misses the budget."""
    floor = _FLOOR * budget
    ridge = max(first_order_weights(pool.p_n, budget).ridge * pool.p_n.size, floor)
    origin = _Point(ridge, np.zeros(pool.transform_rs.shape[1]), pool.p_n, steps)
    low = high = point = _maximum(pool, ridge, origin)
    if point.overshoot(budget) > 0:
        while low.overshoot(budget) > 0:
            if low.ridge <= floor:
                return low
            high, low = low, _maximum(pool, max(floor, low.ridge / 4), low)
    else:
        while high.overshoot(budget) <= 0:
            low, high = high, _maximum(pool, high.ridge * 4, high)
    ends = [low.overshoot(budget), high.overshoot(budget)]
    last: bool | None = None
    for trial in itertools.count(1):
        tie = _TIE / 10 * low.ridge / budget
        at_crossing = low.overshoot(budget) >= -tie and (low.meets(budget) or high.overshoot(budget) <= tie)
        if at_crossing or high.ridge - low.ridge <= 1e-12 * high.ridge:
            break
        # Regula falsi with the Illinois rule (an end that stays twice counts half), every third step a bisection so that it ends.
        share = 0.5 if trial % 3 == 0 else ends[0] / (ends[0] - ends[1])
        point = _maximum(pool, low.ridge + share * (high.ridge - low.ridge), low if share < 0.5 else high)
        over = point.overshoot(budget) > 0
        ends[over] = point.overshoot(budget)
        if over == last:
            ends[not over] /= 2
        low, high, last = (low, point, over) if over else (point, high, over)
    return low if low.meets(budget) else high


def _maximum(pool: _Pool, ridge: float, start: _Point) -> _Point:
    """Semismooth Newton on the dual at this ridge, from the maximum at another one."""
    y_s, steps = start.y_s, start.steps
    excess_n = start.excess_n - _threshold(start.excess_n, ridge)
    tolerance = 1e-12 + 8 * np.finfo(np.float64).eps / ridge  # the second is what rounding of the slopes does to u
    for _ in range(MAX_STEPS):
        point = _Point(ridge, y_s, excess_n, steps)
        gradient_s = pool.transposed_times(point.u_n) - y_s
        if np.linalg.norm(gradient_s) <= tolerance:
            return replace(point, converged=True)
        newton_ss = pool.scatter(np.flatnonzero(excess_n > 0)) / ridge
        newton_ss[np.diag_indices(y_s.size)] += 1
        direction_s = np.asarray(np.linalg.solve(newton_ss, gradient_s), dtype=np.float64)
        share, excess_n = _line_search(point, pool.times(direction_s), direction_s, float(gradient_s @ direction_s))
        y_s, steps = y_s + share * direction_s, steps + 1
    return point


def _line_search(
    start: _Point, change_n: Float64Array, direction_s: Float64Array, rise: float
) -> tuple[float, Float64Array]:
    """How much of the direction to go, at most 1, and the excess there: the dual rises all the way, at last half as fast at most.

    change_n: F times the direction; rise: the derivative of the dual along it at the start.
    """
    low, high, share = 0.0, 1.0, 1.0
    for trial in range(60):
        excess_n = start.excess_n - share * change_n
        excess_n -= _threshold(excess_n, start.ridge)
        u_n = np.maximum(excess_n, 0) / start.ridge
        slope = float(change_n @ u_n - (start.y_s + share * direction_s) @ direction_s)
        if (trial == 0 and slope >= -0.01 * rise) or 0 <= slope <= 0.5 * rise:
            break
        low, high = (low, share) if slope < 0 else (share, high)
        share = (low + high) / 2
    return share, excess_n


def _threshold(slopes_n: Float64Array, ridge: float) -> float:
    """τ with Σ max(0, slope - τ) = ridge. By Newton's method: the sum is convex and falls, so after one step τ only rises.

    slopes_n: about 0 where τ is expected.
    """
    highest = float(slopes_n.max())
    if ridge == 0:
        return highest
    above = slopes_n[slopes_n > min(0.0, highest - ridge)] - highest
    tau = (float(above.sum()) - ridge) / above.size
    above = slopes_n[slopes_n > highest + tau] - highest
    while True:
        tau = (float(above.sum()) - ridge) / above.size
        still = above[above > tau]
        if still.size == above.size:
            return highest + tau
        above = still


def _certificate(pool: _Pool, u_n: Float64Array, ridge: float) -> tuple[float, float, float, float]:
    """τ, the KKT residual, the duality gap and the objective of u, from u alone, in the units of the solver.

    With v the projection at y = Fᵀu and s its slopes, the gap is ridge |u - v|²/2 + Σ u (τ' - s) where v = 0: no difference of
    large numbers, and never negative.
    """
    y_s = pool.transposed_times(u_n)
    slopes_n = pool.p_n - pool.times(y_s)
    bound = _threshold(slopes_n, ridge)
    gaps_n = np.maximum(slopes_n - bound, 0) - ridge * u_n  # ridge (v - u)
    gap = float(u_n @ np.maximum(bound - slopes_n, 0)) + (float(gaps_n @ gaps_n) / (2 * ridge) if ridge else 0.0)
    positive = u_n > 0
    errors_n = slopes_n - ridge * u_n
    tau = float(errors_n[positive].mean())
    errors_n -= tau
    residual = max(
        float(np.abs(errors_n[positive]).max()),
        float(errors_n.max(where=~positive, initial=0)),
        abs(float(u_n.sum()) - 1),
    )
    objective = float(-pool.p_n @ u_n + y_s @ y_s / 2 + ridge / 2 * (u_n @ u_n))
    return tau, residual, gap, objective
