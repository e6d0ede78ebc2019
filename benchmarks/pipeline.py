"""Whole selections with the product's own stages, in seconds, beside `rds_plus` and the exact method.

    python benchmarks/pipeline.py --corpus DIR --cache DIR [--model FOLDER] [--out DIR]

They run in one process like `winnow select`, each in an empty store, without the validation, which is not part of a selection and
costs the same for all methods. Then the other `--targets` are selected for in the same store, where what does not depend on the
target is there already. The settings take turns, `--rounds` times; each is a file in the cache, so that a run resumes. The ratios
for a large job are estimated from operations alone.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core_timing import clock_of
from corpus import Corpus, Row, common_arguments, model_folder
from llama_shapes import LLAMA
from measuring import commit, heading
from reporting import table, write_json
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
from worker import summary
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
"""The measured settings, the slowest first. `jvp` runs the first 4 blocks, the default."""
ESTIMATED: Mapping[str, Mapping[str, Any]] = {
    **SETTINGS,
    "5 times the budget": {"refine": {"size": 5}},
    "hidden, a fifth of the pool": {"embedding": {"kind": "hidden"}, "refine": 0.2},
}
"""The settings estimated from operations; `default` up to its cap."""
OTHERS = ("rds_plus", "exact_influence")
"""What the settings are compared with."""
LARGE = {"rows": 200_000, "targets": 48, "landmarks": 4096, "budget": 10_000}


console = Console(stderr=True)


def main() -> None:
    options = arguments()
    bench = Bench(options)
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in SETTINGS}
    for turn in range(options.rounds):
        for name in SETTINGS:
            found[name].append(bench.selections(name, turn))
    first = found["rds_plus"][0][0]
    result = {
        **heading(options),
        "rows": options.rows,
        "targets": {name: len(rows) for name, rows in bench.targets.items()},
        "budget": bench.budget,
        "tokens": {name: round(of["tokens"]) for name, of in first["tokens"].items()},
        "dtype": first["dtype"],
        "settings": {name: against(found, name) for name in SETTINGS},
        "large": of_large_pool(
            bench.folder, {name: TokenCounts(**of) for name, of in first["tokens"].items()}, options
        ),
    }
    lines = tables(result)
    print(lines)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "pipeline.json", result)
        (options.out / "pipeline.md").write_text(lines)


def arguments() -> argparse.Namespace:
    parser = common_arguments(__doc__, rows=5000, targets=["gsm8k", "squad"])
    parser.add_argument("--target-rows", type=int, default=48)
    parser.add_argument("--landmarks", type=int, help="default: the product's own number")
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


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


class Bench:
    """Selections for `--targets` from `--rows` rows of the pool, each piece kept in the cache."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, model_folder(options).resolve()
        corpus = Corpus(options.corpus)
        self.pool = corpus.pool(options.rows, options.seed)
        self.targets = {name: corpus.target(name, "dev")[: options.target_rows] for name in options.targets}
        self.budget = max(1, len(self.pool) // 20)
        self._compute: TimedCompute | None = None

    def selections(self, name: str, turn: int) -> list[dict[str, Any]]:
        """One setting's selection for each target, in one store: seconds and operations of each stage, and the token counts."""
        path = self.options.cache / "pipeline" / f"{self._key()}.{turn}.{name.replace(' ', '_')}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"selections": list(self._select(SETTINGS[name]))})
            console.print(f"{path.name}: done", highlight=False)
        found: list[dict[str, Any]] = json.loads(path.read_text())["selections"]
        return found

    def _key(self) -> str:
        unrelated = {"cache", "out", "beside", "rounds"}
        known = {key: str(value) for key, value in sorted(vars(self.options).items()) if key not in unrelated}
        return hashlib.sha256(json.dumps([known, commit()]).encode()).hexdigest()[:16]

    def _select(self, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="winnow-") as store:
            for target in self.targets.values():
                yield self._one(ArtifactStore(store), self.pool, target, given)

    def _one(
        self, store: ArtifactStore, pool: list[Row], target: list[Row], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        compute = self._loaded() if self._compute is None else self._compute
        parameters = _parameters(given, self.options.landmarks, _shape(self.folder), self.options)
        compute.store, compute.seconds = store, {}
        contents = [_register(store, rows) for rows in (pool, target)]
        budget = min(self.budget, len(pool))
        job = JobInputs(
            model=resolve(ModelSettings(folder=self.folder.parent), self.folder.name, Parameters(**parameters)),
            pool=contents[0].fingerprint,
            target=contents[1].fingerprint,
            budget=budget,
            parameters=parameters,
        )
        with Progress(console=Console(quiet=True)) as progress:
            done = LocalJob(compute, job, progress).run(len(pool) + len(target))
        prepared = done[Stage.PREPARE][-1].result
        counts = JobCounts.of_prepared(prepared, budget)
        operations_of = _operations(self.folder, parameters, counts, done)  # also of stages that were all reused
        found = summary.of_method({stage: [unit.result for unit in units] for stage, units in done.items()})
        return {
            "seconds": dict(compute.seconds),
            "operations": {stage: work for stage, work in operations_of.items() if stage in compute.seconds},
            "tokens": {name: asdict(getattr(counts, name)) for name in ("pool", "target")},
            "dtype": prepared["dtype"],
            **{name: found[name] for name in ("landmark_count", "refined_count", "refinement")},
        }

    def _loaded(self) -> TimedCompute:
        """One-time work, above all loading the model, is done before anything is timed."""
        clock, settings = clock_of(self.options.device), WorkerSettings(device=self.options.device)
        store = str(self.options.cache.resolve())
        self._compute = TimedCompute(clock, artifacts=store, models=self.folder.parent, settings=settings)
        few = next(iter(self.targets.values()))[:2]
        with tempfile.TemporaryDirectory(prefix="winnow-") as scratch:
            self._one(ArtifactStore(scratch), self.pool[:8], few, {"method": "exact_influence"})
        return self._compute


def _parameters(
    given: Mapping[str, Any], landmarks: int | None, shape: Shape, options: argparse.Namespace
) -> dict[str, Any]:
    chosen = {"validate": False, "seed": options.seed, "max_length": options.max_length, **given}
    if "method" not in given and landmarks is not None:
        chosen["landmarks"] = {"count": landmarks}
    if "embedding" in given:
        chosen["embedding"] = {"blocks": min(4, shape.blocks), **given["embedding"]}
    return Parameters(**chosen).model_dump(mode="json")


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


def against(found: Mapping[str, list[list[dict[str, Any]]]], name: str) -> dict[str, Any]:
    """A setting's selections by target, and how many times as much the others take for the first target.

    found: by setting, turn and target.
    """
    firsts = {other: [_seconds(turn[0]) for turn in turns] for other, turns in found.items()}
    works = {other: sum(turns[0][0]["operations"].values()) for other, turns in found.items()}
    report = []
    for place in range(len(found[name][0])):
        own = [turn[place] for turn in found[name]]
        seconds = [_seconds(one) for one in own]
        one = {
            **{key: own[0][key] for key in ("landmark_count", "refined_count", "refinement")},
            "seconds": seconds,
            "seconds_by_stage": [each["seconds"] for each in own],
            "operations": sum(own[0]["operations"].values()),
            "operations_by_stage": own[0]["operations"],
        }
        for other in OTHERS:
            ratios = [theirs / ours for theirs, ours in zip(firsts[other], seconds, strict=True)]
            one[f"{other}_over_this"] = {
                "operations": works[other] / one["operations"],
                "seconds": statistics.mean(ratios),
                "seconds_sd": statistics.stdev(ratios) if len(ratios) > 1 else None,
            }
        report.append(one)
    return {"first_target": report[0], "later_targets": report[1:]}


def _seconds(selection: Mapping[str, Any]) -> float:
    return float(sum(selection["seconds"].values()))


def of_large_pool(folder: Path, counts: Mapping[str, TokenCounts], options: argparse.Namespace) -> dict[str, Any]:
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


def tables(result: Mapping[str, Any]) -> str:
    return "\n".join([_measured(result), _estimated(result["large"])])


def _measured(result: Mapping[str, Any]) -> str:
    header = [
        f"selection of {result['budget']} from {result['rows']} rows, {result['dtype']}",
        *("target", "exact gradients", "s", "GFLOP"),
        *("rds_plus / this: operations", "seconds", "exact / this: operations", "seconds"),
    ]
    rows = []
    for name, found in result["settings"].items():
        for target, one in zip(result["targets"], [found["first_target"], *found["later_targets"]], strict=True):
            cells = [f"{one['landmark_count'] + one['refined_count']:,}", f"{min(one['seconds']):.1f}"]
            cells.append(f"{one['operations'] / 1e9:,.0f}")
            for ratio in (one[f"{other}_over_this"] for other in OTHERS):
                spread = "" if ratio["seconds_sd"] is None else f" ± {ratio['seconds_sd']:.2f}"
                cells += [f"{ratio['operations']:.2f}", f"{ratio['seconds']:.2f}{spread}"]
            rows.append([name, target, *cells])
    return table(header, rows)


def _estimated(large: Mapping[str, Any]) -> str:
    counted, titles = large["counted"], ("this model", "7b")
    header = [
        f"operations alone, {counted['rows']:,} rows, {counted['landmarks']:,} landmarks",
        *(f"{title}: {what}" for title in titles for what in ("PFLOP", "rds_plus / this", "exact / this")),
    ]
    rows = []
    for name in large[titles[0]]:
        cells: list[str] = []
        for one in (large[title][name] for title in titles):
            ratios = (one[f"{other}_over_this"] for other in OTHERS)
            cells += [f"{one['operations'] / 1e15:,.3g}", *(f"{ratio:.2f}" for ratio in ratios)]
        rows.append([name, *cells])
    return table(header, rows)


if __name__ == "__main__":
    main()
