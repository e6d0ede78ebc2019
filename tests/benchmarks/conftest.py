"""The benchmarks as they are run by hand, on the example data and a tiny random model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.small_form import REPOSITORY, Run
from support.tiny import EXAMPLES


@pytest.fixture
def run_benchmark(tiny_llama: Path, tmp_path: Path) -> Run:
    """Runs `benchmarks/NAME.py` with the options and those that all have; returns the JSON it wrote to `tmp_path/out`.

    The cache is `tmp_path/cache`, so that a second run in one test goes on from the first.
    """

    def run(name: str, *options: str) -> dict[str, Any]:
        common = ["--corpus", str(EXAMPLES), "--model", str(tiny_llama), "--cache", str(tmp_path / "cache")]
        done = subprocess.run(
            [
                sys.executable,
                f"benchmarks/{name}.py",
                *common,
                "--targets",
                "target",
                "--out",
                str(tmp_path / "out"),
                *options,
            ],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "error::UserWarning"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        return found

    return run
