"""The benchmarks as they are run by hand, on the example data and a tiny random model."""

import os
from pathlib import Path
from typing import Any

import pytest
from support.small_form import Run, run_script
from support.tiny import EXAMPLES


@pytest.fixture
def run_benchmark(tiny_llama: Path, tmp_path: Path) -> Run:
    """Runs `benchmarks/NAME.py` with the options and those that all have; returns the JSON it wrote to `tmp_path/out`.

    The cache is `tmp_path/cache`, so that a second run in one test goes on from the first.
    """

    def run(name: str, *options: str) -> dict[str, Any]:
        common = ("--corpus", str(EXAMPLES), "--model", str(tiny_llama), "--targets", "target")
        strict = {"PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "error::UserWarning")}
        return run_script(name, tmp_path, *common, *options, environment=strict)

    return run
