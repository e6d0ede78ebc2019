"""The report of the fidelity benchmark: everything as JSON, tables as Markdown, a plot of overlap against cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting import plt, save_plot, table, write_json

GOAL = {"overlap": 0.9, "share": 0.4}
Point = dict[str, Any]


def write_report(folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "fidelity.json", report)
    (folder / "fidelity.md").write_text("\n".join(_tables(report)))
    save_plot(_plot(report), folder / "fidelity.svg")


def front(points: Sequence[Point], cost: str) -> list[Point]:
    """The Pareto front: points for which no other has more overlap at the same cost or less, cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p[cost], -p["overlap"])):
        if not kept or point["overlap"] > kept[-1]["overlap"]:
            kept.append(point)
    return kept


def _row(point: Point) -> list[object]:
    return [
        point["embedding"],
        point["landmarks"],
        point["choice"],
        point["refine"],
        *(f"{point[name]:.2f} ± {point['sd'][name]:.2f}" for name in ("spearman", "overlap", "captured")),
        f"{point['operations_share']:.2f}",
        f"{point['seconds_share']:.2f}",
    ]


_HEADER = [
    *("embedding", "landmarks", "choice", "refine", "Spearman", "overlap", "influence captured"),
    *("share of operations", "share of seconds"),
]


def _tables(report: dict[str, Any]) -> list[str]:
    points, targets = report["points"], list(report["targets"])
    most = max(point["landmarks"] for point in points)
    middle = sorted({point["landmarks"] for point in points})[-2:][0]
    refine = sorted({point["refine"] for point in points})
    shown = refine[-2:][0]
    uniform = [p for p in points if p["choice"] == "uniform"]
    at_middle = [p for p in uniform if p["landmarks"] == middle and p["refine"] == shown]
    return [
        "## The Pareto front: no other setting has more overlap for fewer operations\n",
        table(_HEADER, [_row(point) for point in front(points, "operations_share")]),
        "## The setting of the paper's authors\n",
        table(_HEADER, [_row(report["authors"])]),
        f"## Embeddings, uniform landmarks, {middle} of them, refine {shown}\n",
        table(
            [*_HEADER, *(f"{t}: Spearman, overlap" for t in targets)],
            [
                [
                    *_row(p),
                    *(f"{p['by_target'][t]['spearman']:.2f}, {p['by_target'][t]['overlap']:.2f}" for t in targets),
                ]
                for p in at_middle
            ],
        ),
        "## Landmarks and refinement, `auto`: overlap (share of operations)\n",
        table(
            ["landmarks", "choice", *(f"refine {share}" for share in refine)],
            [
                [
                    count,
                    choice,
                    *(
                        f"{p['overlap']:.2f} ({p['operations_share']:.2f})"
                        for p in points
                        if (p["embedding"], p["landmarks"], p["choice"]) == ("auto", count, choice)
                    ),
                ]
                for count in sorted({p["landmarks"] for p in points})
                for choice in ("uniform", "stratified")
            ],
        ),
        "## Refinement in rounds, `auto`, stratified\n",
        table(["rounds", *_HEADER], [[point["rounds"], *_row(point)] for point in report["rounds"]]),
        "## Ridge, `auto`, uniform\n",
        table(
            ["ridge", *_HEADER],
            [["by leave-one-out" if p["ridge"] is None else p["ridge"], *_row(p)] for p in report["ridges"]],
        ),
        "## Selection by `top_k` of the mean influence, `auto`, uniform\n",
        table(_HEADER, [_row(point) for point in report["top_k"]]),
        "## Is leave-one-out reliable? Figures for the mean influence, leave-one-out and true\n",
        table(
            [
                "embedding",
                "landmarks",
                "choice",
                "R² leave-one-out",
                "R² true",
                "Spearman leave-one-out",
                "Spearman true",
            ],
            [
                [
                    *(p["embedding"], p["landmarks"], p["choice"]),
                    *(
                        f"{p[name]:.2f} ± {p['sd'][name]:.2f}"
                        for name in ("left_out_r2", "mean_r2", "left_out_spearman", "mean_spearman")
                    ),
                ]
                for p in points
                if p["refine"] == 0 and p["landmarks"] in (min(q["landmarks"] for q in points), middle, most)
            ],
        ),
        "## Agreement of the exact method with itself, and the cost of embedding the pool\n",
        table(
            ["projection of the gradients", "Spearman", "overlap"],
            [[name, found["spearman"], found["overlap"]] for name, found in report["projection"].items()],
        ),
        table(
            ["embedding", "share of operations", "share of seconds"],
            [
                [name, f"{cost['operations_share']:.3f}", f"{cost['seconds_share']:.3f}"]
                for name, cost in report["embedding_share"].items()
            ],
        ),
    ]


def _plot(report: dict[str, Any]) -> Any:
    points = report["points"]
    names = list(dict.fromkeys(point["embedding"] for point in points))
    figure, axes = plt.subplots(figsize=(8, 5))
    colours = plt.get_cmap("tab10")
    for number, name in enumerate(names):
        own = [p for p in points if p["embedding"] == name]
        axes.scatter(
            [p["operations_share"] for p in own],
            [p["overlap"] for p in own],
            s=[10 + 24 * (p["refine"] > 0) for p in own],
            color=colours(number),
            alpha=0.75,
            label=name,
            linewidths=0,
        )
    best = front(points, "operations_share")
    axes.plot(
        [p["operations_share"] for p in best], [p["overlap"] for p in best], color="black", lw=1, label="Pareto front"
    )
    authors = report["authors"]
    place = (authors["operations_share"], authors["overlap"])
    axes.scatter(*place, marker="*", s=160, color="black", zorder=3, label="the authors' setting")
    rounds = [p for p in report["rounds"] if p["rounds"] == 4]
    places = [p["operations_share"] for p in rounds], [p["overlap"] for p in rounds]
    axes.scatter(*places, marker="D", s=22, facecolors="none", edgecolors="black", label="auto, stratified, 4 rounds")
    axes.axvspan(0, GOAL["share"], ymin=GOAL["overlap"] / 1.05, color="green", alpha=0.1)
    axes.annotate("goal", (0.01, 0.97), color="green")
    axes.set(
        xlim=(0, 1.05),
        ylim=(0, 1.05),
        xlabel="operations, as a share of the exact method's",
        ylabel="overlap of the selected 5 %",
    )
    axes.legend(fontsize=7, loc="lower right")
    axes.set_title("Larger dots: with refinement (exact gradients of a shortlist)", fontsize=9)
    return figure
