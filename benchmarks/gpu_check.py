"""What has to be known of a GPU, in one run of at most eight minutes: is the core right there, how fast, what does a job take.

    python benchmarks/gpu_check.py --out DIR
    python benchmarks/gpu_check.py --device cpu --shapes tiny             tries the script itself on a processor

Each part (gpu_parts.py) is a process of its own and has its own report, since an error on a device may leave the process unable
to go on:

* the tests marked `cuda`;
* of random Llamas of each shape, in bfloat16, the tokens a second of the stages, their share of the measured rate of matrix
  products (the aim is 40 % for gradients at 1B and above; it is stated, not asserted), and their peak memory;
* whole jobs on random tokens, the default beside `rds_plus`, and their peak memory.

A part that fails or is stopped keeps what it has measured until then. After `--budget-seconds` everything ends. Without `--out`
nothing is kept. The exit status is 1 where a part failed or did not end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_shapes import LLAMA
from reporting import write_json

AIM = 0.4
"""Share of the rate of matrix products that gradients should reach at 1B and above, in bfloat16."""
LARGE = ("1b", "7b")
PARTS = Path(__file__).with_name("gpu_parts.py")
TESTS_SECONDS = 150


def main() -> None:
    options = arguments()
    ends = time.monotonic() + options.budget_seconds
    result: dict[str, Any] = {"aim": f"gradients of {' and '.join(LARGE)} at {AIM:.0%} of the rate of matrix products"}
    result |= {"device": options.device, "budget_seconds": options.budget_seconds, "parts": {}}
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        for number, (name, words, most) in enumerate(parts(options)):
            report = Path(folder) / f"{number}.json"
            command = [sys.executable, str(PARTS), *words, "--device", options.device, "--report", str(report)]
            result["parts"][name] = found = run(command, report, min(ends - time.monotonic(), most))
            print(f"{name}: {found['status']} after {found['seconds']:.0f} s", flush=True)
            print("".join(f"  {line}\n" for line in lines(found)), end="", flush=True)
            if options.out is not None:  # after each part: who ends this run keeps what it has
                options.out.mkdir(parents=True, exist_ok=True)
                write_json(options.out / "gpu.json", result)
    sys.exit(any(part["status"] != "done" for part in result["parts"].values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--shapes", nargs="+", choices=list(LLAMA), default=["135m", "1b", "7b"])
    parser.add_argument("--job-shape", choices=list(LLAMA), help="of the whole jobs; default: 1b, else the first shape")
    parser.add_argument("--budget-seconds", type=float, default=480)
    parser.add_argument("--out", type=Path, help="folder for gpu.json; nothing is written without it")
    options = parser.parse_args()
    options.job_shape = options.job_shape or ("1b" if "1b" in options.shapes else options.shapes[0])
    return options


def parts(options: argparse.Namespace) -> Iterator[tuple[str, list[str], float]]:
    """Each with its words and the seconds it may take; the largest shape is last, since it is the likeliest to be cut off."""
    yield "tests", ["tests"], TESTS_SECONDS
    speeds = [(f"speeds, {shape}", ["speeds", "--shape", shape], options.budget_seconds) for shape in options.shapes]
    yield from speeds[:-1]
    yield f"jobs, {options.job_shape}", ["jobs", "--shape", options.job_shape], options.budget_seconds
    yield speeds[-1]


def run(command: list[str], report: Path, seconds: float) -> dict[str, Any]:
    """What the part reported, with how it ended: `done`, `failed` with the end of its output, or `stopped`."""
    if seconds < 1:
        return {"status": "stopped: no time was left", "seconds": 0.0}
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=PARTS.parents[1],
        env={**os.environ, "PYTHONPATH": str(PARTS.parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what it started ends with it
    )
    try:
        output = process.communicate(timeout=seconds)[0]
        ended = "done" if process.returncode == 0 else f"failed: {output[-2000:]}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        ended = f"stopped: its {seconds:.0f} s were over"
    found = json.loads(report.read_text()) if report.exists() else {}
    return {"status": ended, "seconds": time.monotonic() - started, **found}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The figures of a part for a reader."""
    for name, one in found.get("stages", {}).items():
        share = f"{one['share_of_matmul_rate']:.0%} of the rate of matrix products"
        peak = "" if one["peak_device_bytes"] is None else f", {one['peak_device_bytes'] / 2**30:.1f} GiB"
        yield f"{name}: {one['tokens_per_second']:,.0f} tokens/s, {share}{peak}"
    for name, one in found.get("jobs", {}).items():
        yield f"{name}: {one['seconds']:.1f} s, {one['seconds_without_validation']:.1f} s of them before the validation"
    if "tests" in found:
        yield ", ".join(f"{count} {what}" for what, count in found["tests"].items())


if __name__ == "__main__":
    main()
