"""The small form of the fidelity benchmark: what must hold of its points whatever the model."""

from pathlib import Path

import pytest
from support.small_form import Run

OPTIONS = ("--rows", "120", "--max-length", "64", "--projection-dim", "192", "--dtype", "float32", "--draws", "3")
GRID = ("--landmarks", "16", "120", "--refine", "0", "1")


@pytest.mark.slow
def test_the_points_are_what_they_must_be_where_it_is_known(run_benchmark: Run, tmp_path: Path) -> None:
    found = run_benchmark("fidelity", *OPTIONS, *GRID, "--processes", "1")
    assert len(found["ids"]) == len(set(found["ids"])) == 120
    points = found["points"]
    assert {(p["landmarks"], p["refine"]) for p in points} == {(16, 0), (16, 1), (120, 0), (120, 1)}
    for point in points:
        whole = point["landmarks"] == 120 or point["refine"] == 1
        # All is exact: the same choice at the price of every gradient, and of an embedding that was not needed.
        assert (point["overlap"] == 1) == whole or point["overlap"] < 1, point
        if whole:
            assert point["overlap"] == point["captured"] == 1
            assert point["operations_share"] > 1
        else:
            assert 0 < point["operations_share"] < 1
            assert point["overlap"] < 1
    rds = [p for p in points if p["embedding"] == "rds" and p["landmarks"] == 16 and p["refine"] == 0]
    hidden = [p for p in points if p["embedding"] == "hidden 1 last" and p["landmarks"] == 16 and p["refine"] == 0]
    assert rds[0]["operations_share"] > hidden[0]["operations_share"], "all blocks cost more than one"
    finer, other = found["projection"]["four times the size"], found["projection"]["other signs"]
    assert other["spearman"] < finer["spearman"] < 1

    written = sorted((tmp_path / "cache").rglob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in written]
    again = run_benchmark("fidelity", *OPTIONS, *GRID, "--processes", "1")
    assert [file.stat().st_mtime_ns for file in sorted((tmp_path / "cache").rglob("*.safetensors"))] == times
    assert again["points"] == points, "the draws come from the seed"
    assert "<svg" in (tmp_path / "out" / "fidelity.svg").read_text()[:2000]


@pytest.mark.slow
def test_more_values_of_a_projection_are_nearer_to_the_whole_gradient(run_benchmark: Run) -> None:
    found = run_benchmark("projection", "--rows", "24", "--max-length", "64", "--dims", "128", "1024")
    errors = {(each["projection"], each["values"]): each["error"] for each in found["projections"]}
    few, many = errors["the product's", 128], errors["the product's", 1024]
    # The error falls with the root of the number of values: 2.8 times here.
    assert few / many == pytest.approx(8**0.5, rel=0.4)
    usual = min(error for (name, values), error in errors.items() if name.startswith("random") and values > 300)
    assert many < usual
