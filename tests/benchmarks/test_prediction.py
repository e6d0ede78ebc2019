"""The benchmark of predictions against measured steps, on a tiny random model."""

from pathlib import Path
from typing import Any

import pytest

SMALL = (
    *("--rows", "10", "--warmup", "16", "--weightings", "16", "--few", "16", "--held", "16", "--rank", "4"),
    *("--sgd-rates", "0.01", "0.1", "0.5", "1", "--sgd-wide", "0.1"),
    *("--adamw-rates", "1e-4", "1e-3", "5e-3", "1e-2", "--adamw-wide", "1e-3"),
)


def line(found: dict[str, Any], optimizer: str, step: str, rate: float) -> dict[str, Any]:
    (chosen,) = [x for x in found["lines"][optimizer] if (x["step"], x["learning_rate"]) == (step, rate)]
    return chosen


@pytest.mark.slow
def test_prediction_in_its_limits(run_benchmark: Any, tmp_path: Path) -> None:
    found = run_benchmark("prediction", *SMALL)
    assert found["noise"]["sgd"] < 2e-6
    assert found["weightings"] == {name: {"all": 16, "selected": 8} for name in ("sgd", "adamw")}
    # A small step is of first order, whatever the optimiser, as long as the second moment is held.
    assert line(found, "sgd", "true", 0.1)["predictions"]["none"]["slope_origin"] == pytest.approx(1, abs=0.05)
    assert line(found, "adamw", "held", 1e-3)["predictions"]["none"]["slope_origin"] == pytest.approx(1, abs=0.05)
    # What the Hessian leaves is of third order: its share of what first order leaves falls with the rate.
    for optimizer, step, rate in (("sgd", "true", 1.0), ("adamw", "held", 1e-2)):
        left = {r: line(found, optimizer, step, r) for r in (rate / 2, rate)}
        third = {r: unexplained(x) for r, x in left.items()}
        assert 2**1.5 < left[rate]["spread_left"] / left[rate / 2]["spread_left"] < 2**2.5
        assert 2**2.5 < third[rate] / third[rate / 2] < 2**3.5
        assert left[rate / 2]["left"]["hessian"]["explained"] > 0.9
        assert left[rate / 2]["left"]["hessian"]["explained"] > left[rate / 2]["left"]["fisher"]["explained"]
    pieces = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    again = run_benchmark("prediction", *SMALL)
    assert again["lines"] == found["lines"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == pieces


def unexplained(found: dict[str, Any]) -> float:
    """The spread of what the Hessian does not explain."""
    return float(found["spread_left"] * (1 - found["left"]["hessian"]["explained"]) ** 0.5)
