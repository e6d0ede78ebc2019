"""Speed of the numerical stages relative to the machine's matrix-product rate and to the authors' code.

    python benchmarks/core.py --model DIR --authors DIR --out DIR
    python benchmarks/core.py --shapes 135m 1b 7b --device cuda --dtypes bfloat16 --samples 128 --longest 1024 --out DIR

Every figure is the best of `--rounds`. Rounds of all stages and measurements of the rate alternate, so that other load on the
machine does not affect only one side of a ratio. The setup of a call (drawing directions, checking the model) takes as long for
ten samples as for ten million, so it is timed separately, on no samples, and excluded from the shares. Operations are those that
the method needs, without padding and elementwise work. Seconds are CPU seconds if one thread computes on a CPU, otherwise
wall-clock seconds. `--shapes` are Llamas with random weights. Parts whose options are missing are skipped, as the result says.
"""

import argparse
import gc
import hashlib
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import authors
import core_report
from core_stages import Stage, data_stages, model_stages, random_samples
from core_timing import clock_of, load, matmul_rate, timed
from llama_shapes import LLAMA
from measuring import commit, heading
from reporting import write_json

from worker.influence import Samples

STAGES = [
    *("gradients", "gradients, Adam exact", "gradients, Adam factored", "losses", "weighted gradients"),
    *("jvp", "hidden", "rds", "output", "curvature, ggn", "curvature, hessian"),
    *("influence of landmarks", "kernel ridge fit", "propagation", "round robin", "weighted, second order"),
]
PROFILED = ("gradients", "jvp")


def main() -> None:
    options = arguments()
    measured = [
        piece(options, f"stages-{name}-{dtype}", lambda name=name, dtype=dtype: stage_reports(name, dtype, options))
        for name in (["model"] if options.model else []) + options.shapes
        for dtype in options.dtypes
    ]
    result = {
        **heading(options),
        "stages": measured,
        "authors": authors_report(options),
    }
    tables = core_report.tables(result)
    print(tables)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "core.json", result)
        (options.out / "core.md").write_text(tables)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's folder")
    parser.add_argument("--shapes", nargs="+", choices=list(LLAMA), help="default without --model: 135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="the authors' code runs with the first"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--samples", type=int, default=6, help="of random tokens")
    parser.add_argument("--shortest", type=int, default=60, help="tokens of the shortest sample")
    parser.add_argument("--longest", type=int, default=300, help="tokens of the longest sample")
    parser.add_argument("--token-budget", type=int, help="default: the package's")
    parser.add_argument("--plain-samples", type=int, default=2, help="samples of the runs one sample at a time")
    parser.add_argument("--kernel-landmarks", type=int, default=1024)
    parser.add_argument("--pool-rows", type=int, default=20_000, help="rows of the selection stages")
    parser.add_argument(
        "--matmul-size", type=int, help="rows of the square product; default: 2048, on an accelerator 8192"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--authors", type=Path, help="a checkout of their repository, to compare with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder for measured pieces, so that an interrupted run can resume")
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the result")
    parser.add_argument("--out", type=Path, help="folder for the results; nothing is written without it")
    options = parser.parse_args()
    options.shapes = options.shapes or ([] if options.model else ["135m"])
    return options


def piece(options: argparse.Namespace, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` measures; read from the cache if the same code measured it with the same options."""
    if options.cache is None:
        return make()
    unrelated = {"cache", "out", "beside"}
    known = {key: str(value) for key, value in sorted(vars(options).items()) if key not in unrelated}
    key = hashlib.sha256(json.dumps([known, commit()]).encode()).hexdigest()[:16]
    path = options.cache / f"core-{name}-{key}.json"
    if not path.exists():
        options.cache.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def authors_report(options: argparse.Namespace) -> dict[str, Any] | str:
    if options.authors is None:
        return "not run: no --authors"
    if not (options.authors / "infdist").is_dir():
        return "not run: --authors has no folder infdist"

    def make() -> dict[str, Any]:
        model = load(options.shapes[0] if options.model is None else "model", options.dtypes[0], options)
        return authors.measure(model, samples_for(model, options), options, clock_of(options.device))

    return piece(options, "authors", make)


def samples_for(model: Any, options: argparse.Namespace) -> Samples:
    vocabulary = model.config.vocab_size
    return random_samples(options.samples, options.shortest, options.longest, vocabulary, options.seed)


def stage_reports(name: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every stage, for one model in one dtype."""
    model = load(name, dtype, options)
    samples, clock = samples_for(model, options), clock_of(options.device)
    stages = [stage for stage in _all_stages(model, samples, options) if stage.name in options.stages]
    seconds: list[list[float]] = [[] for _ in stages]
    setup, rates = [float("inf")] * len(stages), dict.fromkeys([stage.dtype for stage in stages], 0.0)
    peaks: list[int | None] = [None] * len(stages)
    for _ in range(options.rounds):
        for i, stage in enumerate(stages):
            spent, peaks[i] = timed(stage.run, stage.samples or samples, clock, options.device)
            seconds[i].append(spent)
            setup[i] = timed(stage.run, samples.slice(0, 0), clock, options.device)[0] if stage.has_setup else 0.0
            rates[stage.dtype] = max(rates[stage.dtype], matmul_rate(stage.dtype, options, clock, min(spent, 0.3)))
    reports = [
        report(stage, seconds[i], setup[i], rates[stage.dtype], samples, clock, options)
        | {"peak_memory_bytes": peaks[i]}
        for i, stage in enumerate(stages)
    ]
    weights = sum(p.numel() for p in model.parameters())
    del model, stages
    gc.collect()
    return {
        "model": name,
        "weights": weights,
        "dtype": dtype,
        "device": options.device,
        "samples": len(samples),
        "tokens": int(samples.lengths.sum()),
        "stages": reports,
    }


def _all_stages(model: Any, samples: Samples, options: argparse.Namespace) -> Iterator[Stage]:
    yield from model_stages(model, samples, options)
    yield from data_stages(model, options)


def report(
    stage: Stage,
    seconds: list[float],
    setup: float,
    rate: float,
    samples: Samples,
    clock: Callable[[], float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    own = [spent - setup for spent in seconds]
    shares = [stage.operations / spent / rate for spent in own] if stage.operations else []
    found: dict[str, Any] = {
        "stage": stage.name,
        "dtype": str(stage.dtype).removeprefix("torch."),
        "rows": stage.rows,
        "unit": "rows" if stage.samples is None else "tokens",
        "seconds": min(own),
        "rounds": own,
        "setup_seconds": setup,
        "rows_per_second": stage.rows / min(own),
        "operations": stage.operations,
        "matmul_rate": rate if stage.operations else None,
        "share_of_matmul_rate": max(shares, default=None),
        "share_mean": statistics.mean(shares) if shares else None,
        "share_sd": statistics.stdev(shares) if len(shares) > 1 else None,
    }
    if stage.plain is not None:
        found |= _beside_plain(stage, min(own) / stage.rows, samples, clock, options)
    if stage.name in PROFILED:
        found["time_by_group"] = core_report.breakdown(lambda: stage.run(samples.slice(0, options.plain_samples)))
    return found


def _beside_plain(
    stage: Stage, seconds_a_token: float, samples: Samples, clock: Callable[[], float], options: argparse.Namespace
) -> dict[str, Any]:
    """How many times as long the plain implementation takes per token, and how far its result is from ours."""
    assert stage.plain is not None
    few = samples.slice(0, min(options.plain_samples, len(samples)))
    start = clock()
    expected = stage.plain(few)
    spent = clock() - start
    spent -= timed(stage.plain, samples.slice(0, 0), clock, options.device)[0]
    found = stage.run(few)
    assert found is not None
    return {
        "times_one_by_one": spent / float(few.lengths.sum()) / seconds_a_token,
        "difference": float((found.flatten() - expected.flatten()).norm() / expected.norm()),
    }


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        main()
