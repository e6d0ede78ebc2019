"""What the small forms of the benchmarks share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from support.tiny import EXAMPLES

REPOSITORY = EXAMPLES.parent
Run = Callable[..., dict[str, Any]]


def run_script(name: str, folder: Path, *options: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs `benchmarks/NAME.py` as it is run by hand, with its cache and results in the folder; returns the JSON it wrote."""
    done = subprocess.run(
        [
            *(sys.executable, f"benchmarks/{name}.py", "--cache", str(folder / "cache"), "--out", str(folder / "out")),
            *options,
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "out" / f"{name}.json").read_text())
    return found
