"""The output of the benchmarks: JSON with everything, Markdown tables, SVG plots."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

matplotlib.use("svg")
plt.rcParams.update(
    {
        "svg.hashsalt": "winnow",  # the same figures give an identical file
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "figure.constrained_layout.use": True,
    }
)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes the file atomically."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.rename(path)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def save_plot(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def earlier(path: Path) -> dict[str, Any]:
    """What the result holds of models so far."""
    return json.loads(path.read_text()).get("models", {}) if path.exists() else {}


def add_model(
    folder: Path | None, name: str, model: str, report: Any, tables: Callable[[dict[str, Any]], list[str]]
) -> None:
    """Writes the report of a model to NAME.json beside those of others, and the tables of all to NAME.md; without a folder,
    nothing."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    models = {**earlier(folder / f"{name}.json"), model: report}
    write_json(folder / f"{name}.json", {"models": models})
    (folder / f"{name}.md").write_text("\n".join(tables(models)))
