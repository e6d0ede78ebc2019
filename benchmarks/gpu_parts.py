"""The parts of gpu_check.py, each in a process of its own: `python benchmarks/gpu_parts.py PART ...`.

A part writes its report anew after every figure, so that what it has is kept when it is stopped.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import numpy as np
import torch
from core_stages import Stage, model_stages, random_samples
from core_timing import clock_of, load, matmul_rate, timed
from llama_shapes import LLAMA
from measuring import commit
from measuring import machine as described
from reporting import write_json

from worker.influence import Samples, backward
from worker.process.machine import repeat_bits

STAGES = ("gradients", "losses", "hidden", "jvp", "rds", "output")
SIZES: Mapping[str, Mapping[str, Any]] = {
    "cuda": {
        "samples": 64,
        "shortest": 200,
        "longest": 1024,
        "rows": 4000,
        "targets": 48,
        "words": 2000,
        "matmul": 8192,
    },
    "cpu": {"samples": 3, "shortest": 20, "longest": 60, "rows": 100, "targets": 6, "words": 400, "matmul": 512},
}
"""Of random samples; and of the rows of whole jobs, of as many words each, up to half the longest, out of `words`."""
TRIED_AT = ("1b", "tiny")
"""The shapes at which other settings are tried, which no figure of a GPU has decided yet."""
TOKEN_BUDGETS = (4096, 65_536)
LOGIT_BYTES = 2**30
OTHERS = (torch.float32, torch.float64)
"""Beside bfloat16: what losses and gradients are summed in, and what propagation computes in."""

Note = Callable[[dict[str, Any]], None]


def main() -> None:
    options = arguments()
    report: dict[str, Any] = {}

    def note(more: dict[str, Any]) -> None:
        report.update(more)
        write_json(options.report, report)

    {"tests": tests, "speeds": speeds, "jobs": jobs}[options.part](options, note)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tests", "speeds", "jobs"))
    parser.add_argument("--shape", choices=list(LLAMA), default="tiny")
    parser.add_argument("--device", required=True)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    options.size = SIZES[torch.device(options.device).type]
    # What the stages of benchmarks/core.py are told beside these.
    options.seed, options.stages, options.token_budget, options.matmul_size = 0, STAGES, None, options.size["matmul"]
    return options


def tests(options: argparse.Namespace, note: Note) -> None:
    """On a processor the same tests there."""
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        chosen = ["tests/numerics", "-m", "cuda"]
        if not options.device.startswith("cuda"):
            chosen = ["tests/numerics/test_devices.py", "-k", "cpu and llama and float32"]
        command = [sys.executable, "-m", "pytest", *chosen, "-q", "-p", "no:cacheprovider"]
        command += [f"--junitxml={folder}/tests.xml", f"--basetemp={folder}/temporary"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not Path(f"{folder}/tests.xml").exists():
            sys.exit(f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
        suite = next(ElementTree.parse(f"{folder}/tests.xml").iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [f"{case.get('name')}" for case in suite.iter("testcase") if case.find("failure") is not None]
    note({"tests": counts, "failed": failed})
    ran = counts["tests"] - counts["skipped"]
    if done.returncode or not ran:
        sys.exit(f"{ran} tests ran\n{done.stdout[-6000:]}")


def speeds(options: argparse.Namespace, note: Note) -> None:
    """Of a random Llama in bfloat16, as the compute process would run it: additions in a fixed order where torch can."""
    repeat_bits(torch.device(options.device))
    model = load(options.shape, "bfloat16", options)
    size, clock = options.size, clock_of(options.device)
    samples = random_samples(size["samples"], size["shortest"], size["longest"], model.config.vocab_size, options.seed)
    rate = matmul_rate(torch.bfloat16, options, clock, 0.3)
    note({"machine": machine(rate, options), "weights": sum(p.numel() for p in model.parameters())})
    note({"tokens": int(samples.lengths.sum()), "matmul_rate": rate})
    stages: dict[str, Any] = {}
    for stage in model_stages(model, samples, options):
        if stage.name in STAGES:
            stages[stage.name] = measured(stage, samples, rate, options)
            note({"stages": stages})
    found: dict[str, Any] = {}
    for name, one in tried(model, samples, rate, options) if options.shape in TRIED_AT else ():
        found[name] = one
        note({"tried": found})


def machine(rate: float, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"commit": commit(), **described(), "cuda": torch.version.cuda}
    if options.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(options.device)
        found |= {"capability": f"{properties.major}.{properties.minor}", "memory_bytes": properties.total_memory}
    others = {str(dtype): matmul_rate(dtype, options, clock_of(options.device), 0.1) for dtype in OTHERS}
    return {**found, "matmul_rates": {str(torch.bfloat16): rate, **others}}


def measured(stage: Stage, samples: Samples, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """The better of two runs, after a small one; without the setup that does not grow with the samples."""
    clock, device = clock_of(options.device), options.device
    few, none = samples.slice(0, 2), samples.slice(0, 0)
    first = timed(stage.run, few, clock, device)[0]
    setup = timed(stage.run, none, clock, device)[0]
    results: list[torch.Tensor | None] = []
    runs = [timed(lambda part: results.append(stage.run(part)), samples, clock, device) for _ in range(2)]
    seconds = min(spent for spent, _ in runs) - setup
    assert stage.operations is not None
    assert all(result is not None for result in results)
    return {
        "tokens_per_second": int(samples.lengths.sum()) / seconds,
        "share_of_matmul_rate": stage.operations / seconds / rate,
        "seconds": [spent - setup for spent, _ in runs],
        "setup_seconds": setup,
        "first_call_seconds": first,
        "peak_device_bytes": runs[-1][1],
        "same_bits_again": torch.equal(results[0], results[1]),  # type: ignore[arg-type]
        "finite": bool(torch.isfinite(results[0]).all()),  # type: ignore[arg-type]
    }


def tried(
    model: Any, samples: Samples, rate: float, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Gradients with other settings than the package's; one that the device refuses says so."""

    def gradients(**changes: Any) -> dict[str, Any]:
        changed = argparse.Namespace(**{**vars(options), "stages": ("gradients",), **changes})
        try:
            return measured(next(iter(model_stages(model, samples, changed))), samples, rate, changed)
        except RuntimeError as error:
            return {"refused": str(error)}

    for budget in TOKEN_BUDGETS:
        yield f"token budget {budget}", gradients(token_budget=budget)
    with patch.object(backward, "LOGIT_BYTES", LOGIT_BYTES):
        yield f"logits in pieces of {LOGIT_BYTES} bytes", gradients()
    torch.use_deterministic_algorithms(True)  # what cannot is an error
    yield "every sum in a fixed order", gradients()
    torch.use_deterministic_algorithms(False)
    yield "sums in any order", gradients()


def jobs(options: argparse.Namespace, note: Note) -> None:
    """Whole jobs as `winnow select` runs them, each in an empty store; the model is loaded before the first."""
    from service.settings import WorkerSettings
    from worker.process.main import Compute

    size, found = options.size, {}
    with tempfile.TemporaryDirectory(prefix="winnow-") as scratch:
        folder = random_model(Path(scratch) / options.shape, options)
        settings = WorkerSettings(device=torch.device(options.device).type)
        compute = Compute(artifacts=scratch, models=folder.parent, settings=settings)
        run_job(compute, folder.name, {"method": "rds_plus"}, options, rows=2 * size["targets"])
        for name, given in (("rds_plus", {"method": "rds_plus"}), ("default", {})):
            found[name] = run_job(compute, folder.name, given, options, rows=size["rows"])
            note({"rows": size["rows"], "targets": size["targets"], "jobs": found})
    before = [found[name]["seconds_without_validation"] for name in ("rds_plus", "default")]
    note({"rds_plus_over_default": before[0] / before[1]})


def run_job(
    compute: Any, model: str, given: Mapping[str, Any], options: argparse.Namespace, *, rows: int
) -> dict[str, Any]:
    from rich.progress import Progress

    from service.plan.parameters import Parameters
    from service.plan.stages import JobInputs, Stage
    from service.storage.artifacts import ArtifactStore
    from worker import local_run

    is_cuda = torch.device(options.device).type == "cuda"
    with tempfile.TemporaryDirectory(prefix="winnow-") as store:
        compute.store = ArtifactStore(store)
        counts = {"pool": rows, "target": options.size["targets"]}
        files = [random_rows(Path(store) / f"{name}.jsonl", count, options) for name, count in counts.items()]
        pool, target = (local_run._register(compute.store, file) for file in files)
        job = JobInputs(
            model={"kind": "registered", "name": model},
            pool=pool.fingerprint,
            target=target.fingerprint,
            budget=max(1, rows // 20),
            parameters=Parameters(**given).model_dump(mode="json"),
        )
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        done = local_run.LocalJob(compute, job, Progress(disable=True)).run(rows)
        seconds = time.perf_counter() - started
    stages = {stage.value: sum(float(unit.result["seconds"]) for unit in units) for stage, units in done.items()}
    return {
        "seconds": seconds,
        "seconds_without_validation": seconds - stages.get(Stage.VALIDATE.value, 0.0),
        "seconds_by_stage": stages,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
        "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def random_model(folder: Path, options: argparse.Namespace) -> Path:
    """A folder with a random Llama in bfloat16 and a tokenizer of as many words as `SIZES` says."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(options.size["words"]))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    load(options.shape, "bfloat16", options).save_pretrained(folder)
    return folder


def random_rows(file: Path, count: int, options: argparse.Namespace) -> Path:
    """Conversations of random words, half of each in the reply."""
    generator, size = np.random.default_rng([options.seed, count]), options.size
    with file.open("w") as lines:
        for length in generator.integers(size["shortest"], size["longest"] // 2 + 1, count):
            said = [f"w{i}" for i in generator.integers(0, size["words"], length)]
            row = {"prompt": " ".join(said[: length // 2]), "completion": " ".join(said[length // 2 :])}
            lines.write(json.dumps(row) + "\n")
    return file


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
