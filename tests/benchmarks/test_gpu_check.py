"""The check of a GPU, tried on a processor: every part measures, and a part that fails takes nothing from the others."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.small_form import REPOSITORY

STAGES = {"gradients", "losses", "hidden", "jvp", "rds", "output"}


def check(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", "--shapes", "tiny", "--out", str(folder), *options],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (folder / "gpu.json").exists(), done.stderr[-4000:]
    return done.returncode, json.loads((folder / "gpu.json").read_text())["parts"]


@pytest.mark.slow
def test_every_part_measures(tmp_path: Path) -> None:
    status, parts = check(tmp_path, "--device", "cpu")
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "done")
    assert list(parts) == ["tests", "jobs, tiny", "speeds, tiny"]
    assert status == 0

    assert parts["tests"]["tests"]["tests"] > parts["tests"]["tests"]["skipped"] == 0
    speeds = parts["speeds, tiny"]
    assert set(speeds["stages"]) == STAGES
    for one in (*speeds["stages"].values(), *speeds["tried"].values()):
        assert one["finite"]
        assert one["same_bits_again"]
        assert one["tokens_per_second"] > 0
    jobs = parts["jobs, tiny"]["jobs"]
    assert jobs["rds_plus"].keys() == jobs["default"].keys()
    assert "embed_target" in jobs["rds_plus"]["seconds_by_stage"]
    assert {"landmark_gradients", "validate"} < set(jobs["default"]["seconds_by_stage"])
    assert parts["jobs, tiny"]["rds_plus_over_default"] > 0


@pytest.mark.slow
def test_what_cannot_run_and_what_has_no_time_says_so(tmp_path: Path) -> None:
    status, parts = check(tmp_path, "--device", "meta")
    assert status == 1
    assert len(parts) == 3
    assert all(part["status"].startswith("failed: ") for part in parts.values())

    status, parts = check(tmp_path, "--budget-seconds", "0")
    assert status == 1
    assert [part["status"] for part in parts.values()] == ["stopped: no time was left"] * 3
