"""Whole selections with the product's own stages, and their cost relative to `rds_plus` and to the exact method.

They run in one process like `winnow select`, each in an empty store, without the validation, which is not part of a selection and
costs the same for all methods. The ratios for a large job are estimated from operations alone.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from corpus import Corpus
from llama_shapes import LLAMA
from rich.console import Console
from rich.progress import Progress

from service.datasets import storage
from service.datasets.convert import convert
from service.datasets.rows.options import RowOptions
from service.models.registry import resolve
from service.plan import operations
from service.plan.job_counts import JobCounts
from service.plan.limits import default_token_budget
from service.plan.operations import Shape, TokenCounts
from service.plan.parameters import Parameters
from service.plan.stage_costs import StageCosts
from service.plan.stages import Done, JobInputs, Stage
from service.settings import ModelSettings, UploadSettings, WorkerSettings
from service.storage.artifacts import ArtifactStore
from worker.local_run import LocalJob
from worker.process.main import Compute

AUTHORS: Mapping[str, Any] = {
    "embedding": {"kind": "jvp", "pooling": "last", "tangents": 2},
    "kernel": {"kind": "rbf", "ridge": 0.01},
    "refine": 0,
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "exact_influence": {"method": "exact_influence"},
    "rds_plus": {"method": "rds_plus"},
    "default": {},
    "as the authors set it": AUTHORS,
}
"""The measured settings. `jvp` runs the first 4 blocks, the default."""
ESTIMATED: Mapping[str, Mapping[str, Any]] = {
    **SETTINGS,
    "5 times the budget": {"refine": {"size": 5}},
    "hidden, a fifth of the pool": {"embedding": {"kind": "hidden"}, "refine": 0.2},
}
"""The settings estimated from operations; `default` up to its cap."""
LARGE = {"rows": 200_000, "targets": 48, "landmarks": 4096, "budget": 10_000}


class TimedCompute(Compute):
    """Records the total seconds of each stage."""

    def __init__(self, clock: Callable[[], float], **given: Any) -> None:
        super().__init__(**given)
        self._clock = clock
        self.seconds: dict[str, float] = {}

    def run(self, unit: Mapping[str, Any], *callbacks: Any) -> dict[str, Any]:
        start = self._clock()
        result = super().run(unit, *callbacks)
        self.seconds[unit["stage"]] = self.seconds.get(unit["stage"], 0.0) + self._clock() - start
        return result


def measure(options: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    folder = options.model.resolve()
    settings = WorkerSettings(device=options.device)
    corpus = Corpus(options.corpus)
    target = corpus.target(options.target, "dev")[: options.target_rows]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory(prefix="winnow-") as scratch:
        compute = TimedCompute(clock, artifacts=scratch, models=folder.parent, settings=settings)
        pool = corpus.pool(options.rows, options.seed)
        # One-time work, above all loading the model, is done before the first measurement.
        _select(compute, folder, pool[: options.landmarks + 1], target[:2], SETTINGS["as the authors set it"], options)
        for _ in range(options.pipeline_rounds):
            for name, given in SETTINGS.items():
                found[name].append(_select(compute, folder, pool, target, given, options))
    counts = found["rds_plus"][0]["counts"]
    return {
        "rows": options.rows,
        "targets": len(target),
        "landmarks": options.landmarks,
        "tokens": {name: round(counts[name].tokens) for name in ("pool", "target")},
        "dtype": found["rds_plus"][0]["dtype"],
        "settings": {name: _against(found, name) for name in SETTINGS},
        "large": _large(folder, counts, options),
    }


def _parameters(given: Mapping[str, Any], landmarks: int, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    chosen = {"validate": False, "seed": options.seed, "max_length": options.max_length, **given}
    if "method" not in given:
        chosen["landmarks"] = {"count": landmarks}
    if "embedding" in given:
        chosen["embedding"] = {"blocks": min(4, shape.blocks), **given["embedding"]}
    return Parameters(**chosen).model_dump(mode="json")


def _select(
    compute: TimedCompute,
    folder: Path,
    pool: list[dict[str, Any]],
    target: list[dict[str, Any]],
    given: Mapping[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One selection in an empty store: seconds and operations of each stage, and the token counts."""
    parameters = _parameters(given, options.landmarks, _shape(folder), options)
    with tempfile.TemporaryDirectory(prefix="winnow-") as store, Progress(console=Console(quiet=True)) as progress:
        compute.store, compute.seconds = ArtifactStore(store), {}
        contents = [_register(compute.store, rows) for rows in (pool, target)]
        model = resolve(ModelSettings(folder=folder.parent), folder.name, Parameters(**parameters))
        budget = max(1, len(pool) // 20)
        job = JobInputs(
            model=model,
            pool=contents[0].fingerprint,
            target=contents[1].fingerprint,
            budget=budget,
            parameters=parameters,
        )
        done = LocalJob(compute, job, progress).run(len(pool) + len(target))
    prepared = done[Stage.PREPARE][-1].result
    counts = JobCounts.of_prepared(prepared, budget)
    return {
        "seconds": dict(compute.seconds),
        "operations": _operations(folder, parameters, counts, done),
        "counts": {"pool": counts.pool, "target": counts.target},
        "dtype": prepared["dtype"],
    }


def _register(store: ArtifactStore, rows: list[dict[str, Any]]) -> storage.Content:
    with tempfile.TemporaryDirectory(prefix="winnow-") as scratch:
        file = Path(scratch) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with file.open("rb") as source:
            content = convert(source, RowOptions(), UploadSettings(), Path(scratch))
        storage.publish(store, content)
        return content


def _operations(
    folder: Path, parameters: Mapping[str, Any], counts: JobCounts, done: Mapping[Stage, list[Done]]
) -> dict[str, float]:
    """As the plan counts them, with the embedding that was chosen."""
    shape = _shape(folder)
    costs = StageCosts(shape, parameters, counts, counts.dtype or "float32", default_token_budget("cpu")).all()
    found = {stage.value: cost.operations for stage, cost in costs.items()}
    if Stage.CHOOSE_EMBEDDING in done:
        chosen = done[Stage.CHOOSE_EMBEDDING][0].result["chosen"]
        found[Stage.EMBED] = operations.embedding(shape, counts.pool, {**parameters["embedding"], **chosen})
    return found


def _shape(folder: Path) -> Shape:
    return Shape.of_config(json.loads((folder / "config.json").read_text()))


def _against(found: Mapping[str, list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """Seconds and operations of a setting, and how many times as much `rds_plus` and the exact method take."""
    totals = {other: [sum(one["seconds"].values()) for one in rounds] for other, rounds in found.items()}
    works = {other: sum(rounds[0]["operations"].values()) for other, rounds in found.items()}
    report: dict[str, Any] = {
        "seconds": totals[name],
        "seconds_by_stage": [one["seconds"] for one in found[name]],
        "operations": works[name],
        "operations_by_stage": found[name][0]["operations"],
    }
    for other in ("rds_plus", "exact_influence"):
        ratios = [theirs / ours for theirs, ours in zip(totals[other], totals[name], strict=True)]
        report[f"{other}_over_this"] = {
            "operations": works[other] / works[name],
            "seconds": statistics.mean(ratios),
            "seconds_sd": statistics.stdev(ratios) if len(ratios) > 1 else None,
        }
    return report


def _large(folder: Path, counts: Mapping[str, TokenCounts], options: argparse.Namespace) -> dict[str, Any]:
    """Operations alone, for a pool of 200,000 such samples, for this model and a Llama of 7B."""
    job = JobCounts(
        pool=counts["pool"].scaled(LARGE["rows"]),
        target=counts["target"].scaled(LARGE["targets"]),
        budget=LARGE["budget"],
        estimated=True,
    )
    report: dict[str, Any] = {"counted": LARGE, "tokens_a_sample": job.pool.tokens / job.pool.samples}
    for title, shape in (("this model", _shape(folder)), ("7b", Shape.of_config(LLAMA["7b"]))):
        works = {}
        for name, given in ESTIMATED.items():
            parameters = _parameters(given, LARGE["landmarks"], shape, options)
            costs = StageCosts(shape, parameters, job, "bfloat16", default_token_budget("cuda")).all()
            works[name] = sum(cost.operations for cost in costs.values())
        report[title] = {
            name: {
                "operations": work,
                "rds_plus_over_this": works["rds_plus"] / work,
                "exact_influence_over_this": works["exact_influence"] / work,
            }
            for name, work in works.items()
        }
    return report
