"""The report of the fidelity benchmark: everything as JSON, tables as Markdown, a plot of turn against cost."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fidelity_calibration import stopped, summary
from reporting import plt, save_plot, table, write_json

Point = dict[str, Any]
GROUPS = {"chosen": "chosen on", "confirmed": "confirmed on"}
AIMS = ((3.5, 0.93), (1.8, 0.97))
FIGURES = ("turn", "top", "overlap", "ndcg", "spearman")
SHORT = {"by_formula": "RDS+ costs, by the formula", "measured": "RDS+ costs, here"}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "fidelity.json", report)
    (folder / "fidelity.md").write_text("\n".join(_tables(report["models"])))
    save_plot(_plot(report["models"]), folder / "fidelity.svg")


def aims(points: list[Point], group: str) -> Iterator[tuple[float, float, Point | None]]:
    """Of each aim: the ratio of costs, the least that turn and top should be, and the setting of the product's embedding that
    comes nearest to it there."""
    for ratio, least in AIMS:
        within = [p for p in points if p["embedding"] == "text" and p["by_group"][group]["by_formula"] >= ratio]
        yield ratio, least, max(within, key=lambda p: _worse(p["by_group"][group]), default=None)


def _worse(figures: Point) -> float:
    return min(figures["turn"], figures["top"])


def _tables(models: dict[str, Any]) -> list[str]:
    lines = [f"# Fidelity: {', '.join(models)}\n"]
    for model, report in models.items():
        points = report["points"]
        targets = list(report["targets"])
        lines.append(f"## {model}: {report['usable']} samples, {report['draws']} draws of landmarks\n")
        for group in points[0]["by_group"]:
            lines += [f"### Targets that it was {GROUPS[group]}\n", table(_HEADER, [_row(p, group) for p in points])]
        lines += [
            "### By target: turn / top\n",
            table(["setting", "landmarks", *targets], [_by_target(p, targets) for p in points]),
            "### The promise against the truth\n",
            _calibration(report["calibration"]),
        ]
    lines += ["## The aim: turn and top at a share of RDS+'s cost, by the formula\n", _aims(models)]
    return lines


_HEADER = [
    "setting",
    "landmarks",
    "refined, x the budget",
    "turn",
    "top",
    "overlap",
    "NDCG",
    "Spearman",
    *SHORT.values(),
]


def _row(point: Point, group: str) -> list[object]:
    figures = point["by_group"][group]
    return [
        *(point["name"], point["landmarks"], f"{figures['times']:.2f}"),
        *(f"{figures[name]:.3f} ± {figures['sd'][name]:.3f}" for name in FIGURES),
        *(f"{figures[name]:.2f}" for name in SHORT),
    ]


def _by_target(point: Point, targets: list[str]) -> list[object]:
    found = (point["by_target"][target] for target in targets)
    return [point["name"], point["landmarks"], *(f"{each['turn']:.3f} / {each['top']:.3f}" for each in found)]


def _aims(models: dict[str, Any]) -> str:
    rows = [
        [
            *(model, GROUPS[group], f"RDS+/{ratio}", f"{least}"),
            *([best["name"], best["landmarks"]] if best else ["none", ""]),
            *([f"{best['by_group'][group][name]:.3f}" for name in ("turn", "top")] if best else ["", ""]),
        ]
        for model, report in models.items()
        for group in report["points"][0]["by_group"]
        for ratio, least, best in aims(report["points"], group)
    ]
    return table(["model", "targets", "cost", "aim", "best setting", "landmarks", "turn", "top"], rows)


def _calibration(records: list[Point]) -> str:
    rows = []
    for what, chosen in _parts(records):
        of, end = summary(chosen), stopped(chosen)
        known = [f"{end['true']:.3f}", f"{end['least']:.3f}", f"{end['times']:.2f}"] if end["stopped"] else ["", "", ""]
        figures = [f"{of['bias']:+.3f}", f"{of['rms']:.3f}", f"{of['correlation']:.2f}"]
        rows.append([what, of["promises"], *figures, f"{end['stopped']} of {end['runs']}", *known])
    return table(
        [
            *("promises", "number", "bias", "rms", "correlation"),
            *("runs promised 0.95", "their true turn", "least", "refined by then, x the budget"),
        ],
        rows,
    )


def _parts(records: list[Point]) -> Iterator[tuple[str, list[Point]]]:
    yield "all", records
    parts: dict[str, Callable[[Point], str]] = {
        "target": lambda each: str(each["target"]),
        "size": lambda each: f"{each['pool']} samples, {each['landmarks']} landmarks",
    }
    for name_of in parts.values():
        for name in dict.fromkeys(map(name_of, records)):
            yield name, [each for each in records if name_of(each) == name]


def _plot(models: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 5), squeeze=False, sharey=True)
    for place, (model, report) in zip(axes[0], models.items(), strict=True):
        group = list(report["points"][0]["by_group"])[-1]
        names = list(dict.fromkeys(_method(point) for point in report["points"]))
        for number, name in enumerate(names):
            own = [point["by_group"][group] for point in report["points"] if _method(point) == name]
            places = [each["by_formula"] for each in own], [each["turn"] for each in own]
            place.scatter(*places, s=22, color=plt.get_cmap("tab10")(number), label=name, linewidths=0)
        for ratio, least in AIMS:
            place.plot([ratio, ratio], [least, 1], color="green", lw=2, alpha=0.5)
        place.set(
            xscale="log", ylim=(0, 1.05), xlabel="RDS+'s operations over the setting's, by the formula", title=model
        )
        place.set(ylabel=f"turn, on the targets that it was {GROUPS[group]}")
        place.legend(fontsize=7, loc="lower left")
    return figure


def _method(point: Point) -> str:
    return str(point["embedding"] or point["name"])
