"""The tables and the plot of `downstream.py`."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from downstream_tasks import FULL_POOL, JOBS, RANDOM, ZERO_SHOT
from reporting import plt, save_plot, table

REFERENCES = (RANDOM, "rds_plus")
"""The methods that the others are compared with, seed by seed and row by row."""


def tables(result: Mapping[str, Any]) -> str:
    parts = [loss_table(result), *difference_tables(result), selection_table(result), accuracy_table(result)]
    return "\n".join(parts)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def loss_table(result: Mapping[str, Any]) -> str:
    header = ["method", "seeds"]
    for target in result["losses"]:
        header += [f"{target} test", "change", "dev"]
    rows = []
    for method in (ZERO_SHOT, *JOBS, FULL_POOL):
        each = [of.get(method, {}) for of in result["losses"].values()]
        row = [method, " ".join(str(len(one.get("seeds", ()))) for one in each)]
        for one in each:
            row += [spread(one.get(name, ())) for name in ("test", "change", "dev")]
        rows.append(row)
    return table(header, rows)


def difference_tables(result: Mapping[str, Any]) -> Iterator[str]:
    """A row for each target and method: the difference from the reference, with both intervals."""
    for reference in REFERENCES:
        rows = []
        for target, of in result["losses"].items():
            for method, each in of.items():
                if found := each["against"].get(reference):
                    verdict = "yes" if found["carried"] else "no"
                    cells = [f"{found['mean']:+.3f}", shown(found["over_seeds"]), shown(found["over_rows"]), verdict]
                    rows.append([target, method, *cells])
        if rows:
            yield table(["target", f"minus {reference}", "mean", "over seeds", "over test rows", "significant"], rows)


def shown(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:+.3f} to {bounds[1]:+.3f}"


def selection_table(result: Mapping[str, Any]) -> str:
    header = ["target", "selection", "seconds", "operations", "overlap with exact", "most frequent sources"]
    rows = []
    for target, of in result["selections"].items():
        for method, each in of.items():
            shared = [one["of_exact"] for one in each if one["of_exact"] is not None]
            sources = ", ".join(f"{name} {count}" for name, count in list(each[0]["sources"].items())[:3])
            seconds, operations = (np.mean([one[name] for one in each]) for name in ("seconds", "operations"))
            rows.append([target, method, f"{seconds:.0f}", f"{operations:.2e}", spread(shared, 2), sources])
    return table(header, rows)


def accuracy_table(result: Mapping[str, Any]) -> str:
    rows = []
    for target, found in result["accuracy"].items():
        verdict = "above chance" if found["above_chance"] else "at chance"
        for method in dict.fromkeys(model["method"] for model in found["models"]):
            models = [model for model in found["models"] if model["method"] == method]
            right = spread([model["right"] / model["rows"] for model in models])
            of = f"{models[0]['rows']}, {models[0]['in_form']} in form"
            rows.append([target, method, right, of, f"{models[0]['chance']:.3f}", f"{models[0]['p']:.2f}", verdict])
    return table(["target", "model", "right", "rows", "chance", "p", "verdict"], rows) if rows else ""


def plot(result: Mapping[str, Any], options: argparse.Namespace) -> None:
    """For each target and method, the change of the test loss from zero-shot: a dot for each seed, a bar for their mean."""
    losses = result["losses"]
    methods = [method for method in (FULL_POOL, *reversed(JOBS)) if any(method in of for of in losses.values())]
    columns = min(3, len(losses))
    lines = -(-len(losses) // columns)
    size = (3.4 * columns + 1.2, 2.6 * lines + 0.4)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True)
    for axis, (target, of) in zip(axes.flat, losses.items(), strict=False):
        for place, method in enumerate(methods):
            if method not in of:
                continue
            change = of[method]["change"]
            color = "tab:red" if method == RANDOM else "tab:gray" if method == FULL_POOL else "tab:blue"
            axis.plot(change, [place] * len(change), "o", color=color, alpha=0.6, markersize=5, clip_on=False)
            axis.plot([np.mean(change)] * 2, [place - 0.3, place + 0.3], color=color, linewidth=2)
            if method == RANDOM:
                axis.axvline(float(np.mean(change)), color=color, linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(methods)), methods)
        axis.set_title(target)
        axis.set_xlabel("change of the test loss from zero-shot, nats")
    for axis in axes.flat[len(losses) :]:
        axis.set_visible(False)
    save_plot(figure, options.out / "downstream.svg")
