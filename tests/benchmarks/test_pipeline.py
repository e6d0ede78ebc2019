"""The benchmark of whole selections on the example data: its ratios, and what a second target pays."""

import math
import shutil
from pathlib import Path

import pytest
from support.small_form import Run
from support.tiny import EXAMPLES

SMALL = ("--rows", "40", "--target-rows", "6", "--landmarks", "8")


@pytest.mark.slow
def test_small_form(run_benchmark: Run, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "targets").mkdir(parents=True)
    shutil.copy(EXAMPLES / "pool.jsonl", corpus)
    rows = (EXAMPLES / "target.jsonl").read_text().splitlines(keepends=True)
    for name, own in (("one", rows[:6]), ("other", rows[6:12])):
        (corpus / "targets" / f"{name}.dev.jsonl").write_text("".join(own))
    options = (*SMALL, "--corpus", str(corpus), "--targets", "one", "other")
    found = run_benchmark("pipeline", *options)

    first = {name: of["first_target"] for name, of in found["settings"].items()}
    work = {name: one["operations_by_stage"] for name, one in first.items()}
    assert first["rds_plus"]["rds_plus_over_this"]["operations"] == 1
    assert all(set(one["seconds_by_stage"][0]) >= set(work[name]) for name, one in first.items())
    # The landmarks' share of the exact method's gradients, all of which are of the pool's samples.
    landmarks = work["default"]["landmark_gradients"] / work["exact_influence"]["landmark_gradients"]
    assert math.isclose(landmarks, 8 / 40, rel_tol=1e-6)

    for name, of in found["settings"].items():
        (second,) = of["later_targets"]
        assert sum(second["seconds"]) < sum(first[name]["seconds"]), "the pool's part is there already"
        assert second["operations"] < first[name]["operations"]
    assert "landmark_gradients" not in found["settings"]["default"]["later_targets"][0]["operations_by_stage"]

    large = found["large"]["7b"]
    costs = [large[name]["operations"] for name in ("default", "5 times the budget", "hidden, a fifth of the pool")]
    assert costs == sorted(costs)
    assert large["default"]["rds_plus_over_this"] > 3

    assert run_benchmark("pipeline", *options) == found, "the second run measures nothing"
