"""The speed benchmark on tiny models: its ratios mean something only where both sides compute the same."""

import math
from pathlib import Path
from typing import Any

import pytest
from support.small_form import run_script

SMALL = [
    *("--shapes", "tiny", "--dtypes", "float32", "--samples", "4", "--longest", "120", "--matmul-size", "256"),
    *("--kernel-landmarks", "48", "--pool-rows", "400", "--rounds", "2"),
]


def run_core(model: Path, folder: Path) -> dict[str, Any]:
    paths = ("--model", str(model), "--authors", str(folder / "absent"))
    return run_script("core", folder, *SMALL, *paths, environment={"PYTHONWARNINGS": "error::UserWarning"})


@pytest.mark.slow
def test_small_form(tiny_llama: Path, tmp_path: Path) -> None:
    found = run_core(tiny_llama, tmp_path)

    assert [one["model"] for one in found["stages"]] == ["model", "tiny"]
    for stages in (one["stages"] for one in found["stages"]):
        counted = [stage for stage in stages if stage["operations"] is not None]
        assert {stage["stage"] for stage in stages} - {stage["stage"] for stage in counted} == {
            "round robin",
            "weighted, second order",
        }
        for stage in counted:
            assert stage["operations"] > 0
            assert math.isfinite(stage["share_of_matmul_rate"])
            assert 0 < stage["share_of_matmul_rate"] < 1.2, stage["stage"]
        compared = {stage["stage"]: stage["difference"] for stage in stages if "difference" in stage}
        assert {"gradients", "gradients, Adam exact", "losses", "weighted gradients", "jvp", "rds"} <= set(compared)
        assert max(compared.values()) < 1e-5, compared

    assert found["authors"] == "not run: --authors has no folder infdist"

    assert run_core(tiny_llama, tmp_path) == found, "the second run measures nothing again"
