"""The analysis of benchmarks/prediction.py: how well each expansion predicts, as tables and a plot.

Shape suffixes: n rows of the pool, t targets, m weightings, r learning rates, d draws.
"""

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from reporting import table

Array = npt.NDArray[np.float64]
Lines = dict[str, list[dict[str, Any]]]
"""The `findings` of each optimiser."""


@dataclass(frozen=True)
class Expansion:
    """Predicts a step on weights w (n,): the first-order terms, and those that each curvature adds; all float64.

    P_nt: scaled inner products with every target. drift: mean slope of the target losses along the offset b.
    factors: B and M of each curvature's form Q = B M Bᵀ. offset: G D_a H b (n,) and bᵀ H b of each.
    """

    P_nt: Array
    drift: float
    factors: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    offset: dict[str, tuple[Array, float]] = field(default_factory=dict)

    def first(self, W_mn: Array, rate: float) -> Array:
        return -rate * (W_mn @ self.P_nt.mean(axis=1) / W_mn.shape[1] + self.drift)

    def second(self, kind: str, W_mn: Array, rate: float) -> Array:
        """The second-order term: rate^2 / 2 times the quadratic form along the step's direction."""
        (B_nr, M_rr), (offset_n, bend) = self.factors[kind], self.offset[kind]
        Y_mr, n = W_mn @ B_nr, W_mn.shape[1]
        form_m = np.einsum("mr,rs,ms->m", Y_mr, M_rr, Y_mr)
        return rate**2 * (form_m / (2 * n) + W_mn @ offset_n / n + bend / 2)


@dataclass(frozen=True)
class Measured:
    """An optimiser's weightings and the effect of steps on them; the first weightings at all rates, the others at some.

    W_mn: weights. selected: bool (m,). changes: (m, r) of each kind of step, NaN where none was taken.
    """

    terms: Expansion
    rates: list[float]
    W_mn: Array
    selected: npt.NDArray[np.bool_]
    changes: dict[str, Array]


def noise_of(measured: Measured) -> float:
    """Spread of the measured change about the prediction at the smallest rate, where the expansion's error is far smaller."""
    rate, changes_m = measured.rates[0], measured.changes["held" if "held" in measured.changes else "true"][:, 0]
    taken_m = np.isfinite(changes_m)
    W_mn = measured.W_mn[taken_m]
    expected_m = measured.terms.first(W_mn, rate) + measured.terms.second("hessian", W_mn, rate)
    return float(np.std(changes_m[taken_m] - expected_m))


def findings(measured: Measured, noise: float, seed: int) -> list[dict[str, Any]]:
    """For each kind of step and rate: how well first order predicts, and how much of its residual each curvature explains.

    Changes, or residuals of first order, whose spread is below three times the noise are not analysed.
    """
    found = []
    for (step, changes_mr), (j, rate) in product(measured.changes.items(), enumerate(measured.rates)):
        taken_m = np.isfinite(changes_mr[:, j])
        W_mn, y_m = measured.W_mn[taken_m], changes_mr[taken_m, j]
        first_m = measured.terms.first(W_mn, rate)
        left_m = y_m - first_m
        line = {
            "step": step,
            "learning_rate": rate,
            "n": len(y_m),
            "mean": float(y_m.mean()),
            "spread": float(y_m.std()),
        }
        line |= {"spread_left": float(left_m.std()), "second_to_first": {}, "predictions": {}, "left": {}}
        if y_m.std() > 3 * noise:
            line["predictions"]["none"] = agreement(first_m, y_m, seed)
        for kind in measured.terms.factors:
            added_m = measured.terms.second(kind, W_mn, rate)
            line["second_to_first"][kind] = float(added_m.std() / first_m.std())
            if y_m.std() > 3 * noise:
                line["predictions"][kind] = agreement(first_m + added_m, y_m, seed)
            if left_m.std() > 3 * noise:
                line["left"][kind] = agreement(added_m, left_m, seed)
        found.append(line)
    return found


def agreement(predicted_m: Array, measured_m: Array, seed: int) -> dict[str, float | list[float]]:
    """Regression of measured on predicted: correlation, slope with an intercept and through the origin, and the share of the
    variance that the prediction explains, 1 - var(measured - predicted) / var(measured); for the first and the last also the
    range of 95 % of 500 bootstrap samples of the weightings."""
    draws_dm = np.random.default_rng([seed, 0xB007]).integers(len(measured_m), size=(500, len(measured_m)))
    correlation, explained = correlation_and_share(predicted_m, measured_m)
    ranges = correlation_and_share(predicted_m[draws_dm], measured_m[draws_dm])
    correlations, shares = (np.nanquantile(values_d, (0.025, 0.975)).tolist() for values_d in ranges)
    return {
        "correlation": float(correlation),
        "correlation_range": correlations,
        "slope": float(correlation * measured_m.std() / predicted_m.std()),
        "slope_origin": float(predicted_m @ measured_m / (predicted_m @ predicted_m)),
        "explained": float(explained),
        "explained_range": shares,
    }


def correlation_and_share(predicted: Array, measured: Array) -> tuple[Array, Array]:
    """Correlation and explained share of the variance, over the last axis."""
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (predicted, measured))
    correlation = (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return correlation, 1 - ((y - x) ** 2).sum(axis=-1) / (y * y).sum(axis=-1)


def tables(lines: Lines, noise: dict[str, float], default_rates: dict[str, float]) -> str:
    """How well each expansion predicts the change, at the rates with most weightings; then the residual of first order at all
    rates: its size, the share of its variance that each curvature explains, correlation and slope with each second-order term."""
    whole, sizes, shares, fits = [], [], [], []
    for name, line in ((name, line) for name, found in lines.items() for line in found):
        mark = " (default)" if line["learning_rate"] == default_rates[name] else ""
        start = [titled(name, line["step"]), f"{line['learning_rate']:g}{mark}", line["n"]]
        most = max(other["n"] for other in lines[name] if other["step"] == line["step"])
        for kind, found in line["predictions"].items() if line["n"] == most else ():
            slopes = f"{found['slope']:.3f}", f"{found['slope_origin']:.3f}"
            whole.append([*start, kind, ranged(found, "correlation"), *slopes, ranged(found, "explained")])
        left = line["left"]
        spreads = f"{line['spread']:.1e}", f"{line['spread_left']:.1e}", f"{line['spread_left'] / noise[name]:.1f}"
        sizes.append([*start, *spreads, *(f"{ratio:.3f}" for ratio in line["second_to_first"].values())])
        if left:
            shares.append([*start, *(ranged(found, "explained") for found in left.values())])
            fits.append([*start, *(f"{found['correlation']:.3f}, {found['slope']:.2f}" for found in left.values())])
    columns, kinds = ("step", "learning rate", "weightings"), [*next(iter(lines.values()))[0]["second_to_first"]]
    agreeing = ("curvature", "correlation", "slope", "slope through 0", "share explained")
    spread = ("spread of the change", "residual of first order", "in units of noise")
    noises = [[name, f"{value:.1e}"] for name, value in noise.items()]
    return "\n".join(
        (
            table(("optimiser", "noise of a measured change, nats"), noises),
            table((*columns, *agreeing), whole),
            table((*columns, *spread, *(f"{kind}: second to first order" for kind in kinds)), sizes),
            table((*columns, *(f"{kind}: share explained" for kind in kinds)), shares),
            table((*columns, *(f"{kind}: correlation, slope" for kind in kinds)), fits),
        )
    )


def titled(name: str, step: str) -> str:
    return f"{name}, second moment held" if step == "held" else name


def ranged(found: dict[str, Any], what: str) -> str:
    low, high = found[f"{what}_range"]
    return f"{found[what]:.3f} ({low:.3f} to {high:.3f})"


def figure(found: dict[str, Measured], lines: Lines, default_rates: dict[str, float]) -> Figure:
    """A row per optimiser: measured against predicted at two rates, and the share of the residual that curvatures explain."""
    drawn, axes = plt.subplots(len(found), 3, figsize=(13.5, 3.8 * len(found)), squeeze=False)
    for row, (name, measured) in zip(axes, found.items(), strict=True):
        counts = np.isfinite(measured.changes["true"]).sum(axis=0)
        wide = [j for j in range(len(counts)) if counts[j] == counts.max()]
        for ax, j in zip(row, (wide[0], wide[-1]), strict=False):
            scatter(ax, measured, j)
            default = " (default)" if measured.rates[j] == default_rates[name] else ""
            ax.set_title(f"{name}, learning rate {measured.rates[j]:g}{default}")
        explained(row[2], lines[name])
        row[2].axvline(default_rates[name], color="black", linewidth=0.8, linestyle=":")
        row[2].set_title(f"{name}: share of the first-order residual explained")
    return drawn


def scatter(ax: Axes, measured: Measured, j: int) -> None:
    changes_m = measured.changes["true"][:, j]
    taken_m = np.isfinite(changes_m)
    W_mn, y_m, selected_m, rate = (
        measured.W_mn[taken_m],
        changes_m[taken_m],
        measured.selected[taken_m],
        measured.rates[j],
    )
    first_m = measured.terms.first(W_mn, rate)
    second_m = first_m + measured.terms.second("hessian", W_mn, rate)
    for x_m, label, colour in ((first_m, "first order", "tab:orange"), (second_m, "hessian", "tab:blue")):
        for some_m, marker, kind in ((~selected_m, "o", "random"), (selected_m, "x", "selected")):
            shown = f"{label}, {kind}"
            ax.scatter(x_m[some_m], y_m[some_m], s=12, marker=marker, color=colour, alpha=0.6, lw=0.8, label=shown)
    ends = [min(y_m.min(), second_m.min()), max(y_m.max(), second_m.max())]
    ax.plot(ends, ends, color="black", linewidth=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel("predicted change of the target loss")
    ax.set_ylabel("measured")
    ax.legend(fontsize=7)


def explained(ax: Axes, found: list[dict[str, Any]]) -> None:
    kinds = {kind: f"C{i}" for i, kind in enumerate(found[0]["second_to_first"])}
    held = any(line["step"] == "held" for line in found)
    for step, kind in product(dict.fromkeys(line["step"] for line in found), kinds):
        points = [line for line in found if line["step"] == step and kind in line["left"]]
        rates = [line["learning_rate"] for line in points]
        shares = [line["left"][kind]["explained"] for line in points]
        label = kind if step == "true" else None
        style = "o-" if step == "true" else "^--"
        ax.plot(rates, shares, style, markersize=3 if "rank" in kind else 5, color=kinds[kind], label=label)
    ax.set_xscale("log")
    ax.set_ylim(-0.5, 1.05)
    ax.set_xlabel("learning rate (dotted: the default)")
    ax.set_ylabel("share of the variance")
    title = "dashed: second\nmoment held" if held else None
    ax.legend(fontsize=7, title=title, title_fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
