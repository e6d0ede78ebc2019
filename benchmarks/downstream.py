"""Does fine-tuning a model on a small selection improve it on the target, and which selection method is best?

    python benchmarks/downstream.py --corpus DIR --cache DIR [--model DIR] [--whole] [--processes 2] [--out DIR]

For each target and method the product selects 5 % of the pool for the target's `dev` split, the model is fine-tuned on it once
per seed, and its loss is measured on the `test` split, alongside the untrained model and one trained on the whole pool. Without
--whole a small version runs that takes two cores less than an hour; in it, all seeds of a method except `random` train on one
selection, that of --seed. Each selection and each run is a file in the cache, so an interrupted benchmark resumes.
"""

import argparse
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
from corpus import common_arguments, model_folder
from downstream_report import REFERENCES, plot, tables
from downstream_tasks import (
    ACCURACIES,
    EQUAL_WEIGHTS,
    FULL_POOL,
    JOBS,
    RANDOM,
    ZERO_SHOT,
    NotMeasured,
    Run,
    Setup,
    bench,
)
from measuring import heading
from reporting import write_json
from rich.console import Console
from scipy import stats

EXACT = "exact_influence"
CHAINS = ((EXACT,), ("rds_plus", "authors' setting", "default", "weighted", EQUAL_WEIGHTS))
"""Selections that one process makes in sequence; the two chains share no substantial work, so they can run concurrently."""
CONFIDENCE = 0.95
WHOLE = {
    "rows": 24_287,
    "targets": ["gsm8k", "squad", "xquad", "mmlu", "bbh", "codex"],
    "landmarks": 4096,
    "epochs": 3,
    "full_epochs": 3,
    "full_seeds": 3,
    "learning_rate": 2e-5,
    "batch_size": 16,
    "test_rows": 500,
    "dev_rows": 64,
    "accuracy": ["gsm8k=500", "mmlu=446"],
    "accuracy_of": "all",
    "varied_selection": True,
}

console = Console(stderr=True)


def main() -> None:
    options = arguments()
    setup, runs = setup_of(options), runs_of(options)
    found = finished(setup, runs) if options.finished else measured(setup, runs, options.processes)
    not_run, runs = [run for run in runs if run not in found], list(found)
    result = {
        **heading(options),
        "setup": {name: value for name, value in asdict(setup).items() if name not in UNREPORTED},
        "seeds": options.seeds,
        "not_run": [asdict(run) for run in not_run],
        "selections": selections_of(setup, runs),
        "losses": {target: losses_of(target, runs, found) for target in options.targets},
        "accuracy": accuracy_of(runs, found),
        "cpu_seconds": {
            name: sum(each[f"{name}_cpu_seconds"] for each in found.values()) for name in ("training", "measuring")
        },
    }
    if options.out is None:
        console.print(tables(result), markup=False)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "downstream.json", result)
    (options.out / "downstream.md").write_text(tables(result))
    plot(result, options)


# Options

UNREPORTED = ("corpus", "cache", "model", "finished")


def arguments() -> argparse.Namespace:
    parser = common_arguments(__doc__, rows=240, targets=["gsm8k", "squad"])
    parser.add_argument("--whole", action="store_true", help="the whole pool and six targets: hours on a GPU")
    parser.add_argument("--finished", action="store_true", help="measure nothing, report what is in the cache")
    parser.add_argument("--methods", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--processes", type=int, default=2, help="each with one thread")
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings, and of random draws")
    parser.add_argument(
        "--varied-selection", action="store_true", help="every method makes a new selection for each seed"
    )
    parser.add_argument("--full-seeds", type=int, default=1, help="number of trainings on the whole pool")
    parser.add_argument("--share", type=float, default=0.05, help="share of the pool that is selected")
    parser.add_argument("--landmarks", type=int, default=36)
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the embeddings")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--full-epochs", type=int, default=1, help="epochs of a training on the whole pool")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="chosen on dev splits")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the matrix products in training"
    )
    parser.add_argument(
        "--test-rows", type=int, default=20, help="at most this many of each test split, drawn by --seed"
    )
    parser.add_argument("--dev-rows", type=int, default=0, help="rows of each dev split whose loss is reported too")
    parser.add_argument(
        "--accuracy",
        nargs="*",
        default=["gsm8k=40", "mmlu=100"],
        metavar="TARGET=ROWS",
        help=f"targets: {', '.join(ACCURACIES)}",
    )
    parser.add_argument("--accuracy-of", choices=[ZERO_SHOT, "all"], default=ZERO_SHOT)
    if parser.parse_known_args()[0].whole:
        parser.set_defaults(**WHOLE)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    options.model = model_folder(options)
    return options


def setup_of(options: argparse.Namespace) -> Setup:
    given = {field.name: getattr(options, field.name) for field in fields(Setup)}
    given["accuracy"] = [(name, int(rows)) for name, _, rows in (each.partition("=") for each in options.accuracy)]
    return Setup(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def runs_of(options: argparse.Namespace) -> list[Run]:
    """Models that do not depend on a target are measured on all of them."""
    seeds, targets = range(options.seed, options.seed + options.seeds), tuple(options.targets)
    free = [Run(method=ZERO_SHOT, seed=options.seed, targets=targets)]
    free += [Run(method=RANDOM, seed=seed, targets=targets) for seed in seeds if RANDOM in options.methods]
    full = [Run(method=FULL_POOL, seed=seed, targets=targets) for seed in seeds[: options.full_seeds]]
    chosen = [
        Run(method=method, seed=seed, targets=(target,))
        for target in targets
        for method in options.methods
        for seed in seeds
        if method != RANDOM
    ]
    return [*free, *full, *chosen]


# Measuring


def measured(setup: Setup, runs: Sequence[Run], processes: int) -> dict[Run, dict[str, Any]]:
    """The result of each run. Targets are processed in order; a run starts once its selection is ready."""
    by_target = [
        [run for run in runs if run.method in JOBS and run.method != RANDOM and run.targets == (target,)]
        for target in setup.targets
    ]
    found: dict[Future[dict[str, Any]], Run] = {}
    with executor(processes) as pool:
        try:
            for run in runs:
                if run.method in (ZERO_SHOT, RANDOM):
                    found[pool.submit(measure, setup, run)] = run
            for own in by_target:
                selecting = {
                    pool.submit(select, setup, [run for run in own if run.method in chain]): chain for chain in CHAINS
                }
                for ready in as_completed([*selecting, *found]):
                    ready.result()
                    chain = selecting.get(ready, ())
                    found |= {pool.submit(measure, setup, run): run for run in own if run.method in chain}
            found |= {pool.submit(measure, setup, run): run for run in runs if run.method == FULL_POOL}
            for ready in as_completed(found):
                ready.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {run: future.result() for future, run in found.items()}


def finished(setup: Setup, runs: Sequence[Run]) -> dict[Run, dict[str, Any]]:
    found = {}
    for run in runs:
        with suppress(NotMeasured):
            found[run] = bench(setup).measure(run)
    return found


def executor(processes: int) -> Executor:
    if processes == 1:
        return ThreadPoolExecutor(1, initializer=one_thread)
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=one_thread)


def one_thread() -> None:
    torch.set_num_threads(1)


def select(setup: Setup, runs: Sequence[Run]) -> None:
    for run in runs:
        bench(setup).selection(run.method, run.targets[0], bench(setup).selection_seed(run))


def measure(setup: Setup, run: Run) -> dict[str, Any]:
    found = bench(setup).measure(run)
    console.print(f"done: {run.method}, seed {run.seed}, {' '.join(run.targets)}")
    return found


def selections_of(setup: Setup, runs: Sequence[Run]) -> dict[str, Any]:
    """For each target and method: the selections by seed, without their ids, and their overlap with the exact method's."""
    place = bench(setup)
    found: dict[str, Any] = {target: {} for target in setup.targets}
    for run in runs:
        for target in run.targets if run.method in JOBS else ():
            # Random selections do not depend on the target: all use the first one's.
            named = run.targets[0]
            seed = place.selection_seed(run)
            truth = Run(method=EXACT, seed=run.seed, targets=(target,))
            exact = place.selection(EXACT, target, place.selection_seed(truth)) if truth in runs else None
            selection = place.selection(run.method, named, seed)
            reported = {name: value for name, value in selection.items() if name not in ("ids", "weights", "given")}
            reported["seed"] = seed
            reported["heaviest"] = max(selection["weights"])
            reported["of_exact"] = exact and len({*selection["ids"]} & {*exact["ids"]}) / len(exact["ids"])
            found[target].setdefault(run.method, {})[seed] = reported
    return {target: {name: [*each.values()] for name, each in of.items()} for target, of in found.items()}


# Results


def losses_of(target: str, runs: Sequence[Run], found: Mapping[Run, dict[str, Any]]) -> dict[str, Any]:
    """For each method, by seed: the mean loss on both splits, the change from zero-shot, the differences from the references."""
    rows = {
        method: {
            run.seed: found[run]["losses"][target] for run in runs if run.method == method and target in run.targets
        }
        for method in dict.fromkeys(run.method for run in runs if target in run.targets)
    }
    before = next(iter(rows[ZERO_SHOT].values()))
    result = {}
    for method, of_seeds in rows.items():
        result[method] = {
            "seeds": list(of_seeds),
            "test": [float(np.mean(each["test"])) for each in of_seeds.values()],
            "dev": [float(np.mean(each["dev"])) for each in of_seeds.values() if each["dev"]],
            "change": [float(np.mean(each["test"]) - np.mean(before["test"])) for each in of_seeds.values()],
            "against": {
                name: difference(of_seeds, rows[name])
                for name in REFERENCES
                if method in JOBS and method != name and of_seeds.keys() <= rows.get(name, {}).keys()
            },
        }
    return result


def difference(
    ours: Mapping[int, dict[str, list[float]]], theirs: Mapping[int, dict[str, list[float]]]
) -> dict[str, Any]:
    """The test loss minus the reference's, paired: over seeds, and over test rows (of the mean over seeds).

    It is `carried` if both intervals exclude 0: neither another training nor another draw of the test rows would reverse it.
    """
    rows_sr = np.array([np.subtract(ours[seed]["test"], theirs[seed]["test"]) for seed in ours])
    seeds, rows = rows_sr.mean(axis=1), rows_sr.mean(axis=0)
    intervals = {"over_seeds": interval(seeds), "over_rows": interval(rows)}
    signs = {sign for found in intervals.values() for sign in (np.sign(found) if found else (0.0,))}
    return {
        "mean": float(seeds.mean()),
        "by_seed": seeds.tolist(),
        **intervals,
        "carried": len(signs) == 1 and 0.0 not in signs,
    }


def interval(values: np.ndarray[Any, Any]) -> list[float] | None:
    """Confidence interval of the mean by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return [float(values.mean() - half), float(values.mean() + half)]


def accuracy_of(runs: Sequence[Run], found: Mapping[Run, dict[str, Any]]) -> dict[str, Any]:
    """By target and model, with a one-sided binomial test against chance, corrected for the number of models."""
    result: dict[str, Any] = {}
    for run in runs:
        for target, counts in found[run]["accuracy"].items():
            p = stats.binomtest(counts["right"], counts["rows"], counts["chance"], alternative="greater").pvalue
            result.setdefault(target, []).append({"method": run.method, "seed": run.seed, **counts, "p": float(p)})
    return {
        target: {"above_chance": bool(min(each["p"] for each in of) * len(of) < 1 - CONFIDENCE), "models": of}
        for target, of in result.items()
    }


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # for the child processes
    torch.set_num_threads(1)
    main()
