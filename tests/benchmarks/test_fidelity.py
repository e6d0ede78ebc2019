"""The small forms of the fidelity benchmarks: what must hold of their points whatever the model."""

from pathlib import Path
from typing import Any

import pytest
from support.small_form import Run

OPTIONS = ("--rows", "120", "--max-length", "64", "--projection-dim", "192", "--dtype", "float32", "--draws", "3")
FIGURES = ("turn", "top", "overlap", "ndcg")


def only_model(found: dict[str, Any]) -> dict[str, Any]:
    (report,) = found["models"].values()
    return dict(report)


@pytest.mark.slow
def test_the_points_are_what_they_must_be_where_it_is_known(run_benchmark: Run, tmp_path: Path) -> None:
    options = (*OPTIONS, "--landmarks", "16", "--times", "0", "2.4", "25", "--processes", "1")
    report = only_model(run_benchmark("fidelity", *options, "--blocks", "1"))
    assert len(report["ids"]) == len(set(report["ids"])) == 120
    points = {(p["name"], p["landmarks"]): p["by_group"]["confirmed"] for p in report["points"]}
    bare, some, everything = (points[f"text, {times} x", 16] for times in (0.0, 2.4, 25.0))
    # All is exact: the exact choice, at the price of every gradient.
    assert [everything[name] for name in FIGURES] == [1, 1, 1, 1]
    assert everything["measured"] < 1 < some["measured"] < bare["measured"]
    assert (bare["by_formula"], some["by_formula"]) == pytest.approx((25, 3.571), abs=1e-3)
    assert bare["turn"] < some["turn"] < 1
    assert all(0 <= point[name] <= 1 for point in points.values() for name in ("overlap", "ndcg"))
    assert points["rds_plus", 0]["measured"] == 1
    assert points["as the authors set it", 16]["measured"] < bare["measured"], "a JVP is not for nothing"
    assert points["output, 2.4 x", 16]["measured"] < some["measured"], "a pass through the model, and its head"
    assert points["output, 0.0 x", 16]["by_formula"] == pytest.approx(1 / 1.04, abs=1e-3)
    promises = report["calibration"]
    assert {each["draw"] for each in promises} == {0, 1, 2}
    assert all(each["promised"] <= 1 and 1 <= each["times"] <= 5 for each in promises)

    written = sorted((tmp_path / "cache").rglob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in written]
    again = only_model(run_benchmark("fidelity", *options, "--blocks", "1"))
    assert [file.stat().st_mtime_ns for file in sorted((tmp_path / "cache").rglob("*.safetensors"))] == times
    assert (again["points"], again["calibration"]) == (report["points"], promises), "the draws come from the seed"
    assert "<svg" in (tmp_path / "out" / "fidelity.svg").read_text()[:2000]


@pytest.mark.slow
def test_the_ablations_change_what_they_say(run_benchmark: Run) -> None:
    deep = ("--blocks", "1", "30", "--tangents", "1", "--deepest-jvp", "1", "--landmarks", "16", "--processes", "1")
    points = only_model(run_benchmark("blocks", *OPTIONS, *deep))["points"]
    names = list(dict.fromkeys(point["name"] for point in points))
    assert names[:2] == ["text", "hidden 1 last"]
    assert names[-1] == "jvp 1 last, 1"
    costs = {p["name"]: p["by_group"]["confirmed"]["measured"] for p in points if p["times"] == 0}
    assert costs["text"] > costs["hidden 1 last"] > costs["jvp 1 last, 1"], (
        "nothing, one pass of a block, three of them"
    )

    parts = only_model(run_benchmark("parts", *OPTIONS, "--landmarks", "16", "--processes", "1"))["points"]
    figures = {point["name"]: point["by_group"]["confirmed"] for point in parts}
    assert len(figures) == len(parts) == 16
    assert figures["lengths alone"]["spearman"] != figures["scalars alone"]["spearman"]
    assert figures["1 rounds"]["spearman"] == figures["the product's"]["spearman"], "before the first round"

    training = ("--steps", "0", "4", "--batch-size", "4", "--learning-rate", "0.01")
    report = run_benchmark("warmup", *OPTIONS, *training, "--landmarks", "16", "--processes", "1")
    before, after = only_model(report)["points"]
    assert before["beside"]["confirmed"] == {"overlap": 1, "turn": 1}
    assert before["cost"]["operations"] == 0 < after["cost"]["operations"]
    assert after["beside"]["confirmed"]["turn"] < 1, "the trained model selects other samples"


@pytest.mark.slow
def test_more_values_of_a_projection_are_nearer_to_the_whole_gradient(run_benchmark: Run) -> None:
    found = run_benchmark("projection", "--rows", "24", "--max-length", "64", "--dims", "128", "1024")
    errors = {(each["projection"], each["values"]): each["error"] for each in found["projections"]}
    few, many = errors["the product's", 128], errors["the product's", 1024]
    # The error falls with the root of the number of values: 2.8 times here.
    assert few / many == pytest.approx(8**0.5, rel=0.4)
    usual = min(error for (name, values), error in errors.items() if name.startswith("random") and values > 300)
    assert many < usual
