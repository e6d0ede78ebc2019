"""`winnow select`: the whole job in one process, without servers. The same stages, artifacts and shards as the service.

winnow select --model DIR --pool pool.jsonl --target dev.jsonl --budget 1000 --out selection.parquet
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from safetensors.numpy import load_file

from service.artifacts import ArtifactStore
from service.assignments import assigned
from service.assignments import budget as read_budget
from service.datasets import storage
from service.datasets.convert import convert
from service.datasets.formats import Form
from service.errors import ApiError, field_error
from service.jobs.ledger import UnitSpec
from service.jobs.parameters import Parameters
from service.jobs.state import Stage
from service.models import ADAPTER_CONFIG, resolve
from service.packages import unsafe_packages
from service.results import formats
from service.scratch import scratch, temporary_folder
from service.settings import ModelSettings, UploadSettings, WorkerSettings
from worker import summary
from worker.compute import Compute
from worker.errors import ParameterError, UnitError
from worker.stages import plan
from worker.stages.keys import result_key
from worker.stages.plan import Done, JobInputs

_BATCH = 16_384
_ENCODERS = {".jsonl": formats.jsonl, ".csv": formats.comma_separated, ".parquet": formats.parquet}


class LocalJob:
    """A job's stages, run one after the other in this process; planned as the service plans them."""

    def __init__(self, compute: Compute, job: JobInputs, progress: Progress) -> None:
        self._compute = compute
        self._job = job
        self._progress = progress

    def run(self, rows: int) -> dict[Stage, list[Done]]:
        """Runs all stages; returns their finished units."""
        wave = [UnitSpec(stage=Stage.PREPARE, shard=0, artifact_key="prepare/local", spec={}, total=rows)]
        done: dict[Stage, list[Done]] = {}
        while wave:
            for stage, units in groupby(wave, key=attrgetter("stage")):
                finished = self._stage(list(units), done)
                done.setdefault(stage, []).extend(finished)
            wave = plan.next_units(self._job, done)
        return done

    def _stage(self, units: list[UnitSpec], done: Mapping[Stage, list[Done]]) -> list[Done]:
        bar = self._progress.add_task(units[0].stage, total=sum(unit.total for unit in units))
        finished, before = [], 0
        for unit in units:
            result = self._unit(unit, done, partial(self._advance, bar, before))
            finished.append(Done(artifact_key=unit.artifact_key, spec=unit.spec, result=result))
            before += unit.total
            self._progress.update(bar, completed=before)
        self._progress.stop_task(bar)
        return finished

    def _advance(self, bar: TaskID, before: int, done: int) -> None:
        self._progress.update(bar, completed=before + done)

    def _unit(self, unit: UnitSpec, done: Mapping[Stage, list[Done]], report: Callable[[int], None]) -> dict[str, Any]:
        key = result_key(unit.artifact_key)
        if unit.stage != Stage.PREPARE and self._compute.store.exists(key):
            return dict(self._compute.store.read_json(key))
        message = {
            "stage": unit.stage,
            "artifact_key": unit.artifact_key,
            "spec": unit.spec,
            "job": self._job.as_dict(),
            "prepared": done[Stage.PREPARE][0].result if done else {},
            "halvings": 0,
        }
        return self._compute.run(message, report, lambda *_: None)


def _register(store: ArtifactStore, file: Path) -> storage.Content:
    with scratch(temporary_folder()) as folder, file.open("rb") as source:
        content = convert(source, Form.AUTO, UploadSettings(), folder)
        storage.publish(store, content)
        return content


def _write(path: Path, store: ArtifactStore, pool: str, arrays: Mapping[str, Any], selected_only: bool) -> None:
    """Writes one row a sample, the columns of the service's export; the file appears only once it is whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            for chunk in _ENCODERS[path.suffix](_columns(store, pool, arrays, selected_only)):
                file.write(chunk)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _columns(
    store: ArtifactStore, pool: str, arrays: Mapping[str, Any], selected_only: bool
) -> Iterator[pa.RecordBatch]:
    rank = np.full(len(arrays["influence"]), -1)
    rank[arrays["selected"]] = np.arange(len(arrays["selected"]))
    start = 0
    for ids, sources in storage.iter_ids(store, pool):
        rows = np.arange(start, start + len(ids))
        start += len(ids)
        if selected_only:
            rows = rows[rank[rows] >= 0]
        base = start - len(ids)
        yield formats.batch_of(
            {
                "index": rows,
                "id": [ids[row - base] for row in rows],
                "source": [sources[row - base] for row in rows],
                "influence": arrays["influence"][rows],
                "weight": arrays["weight"][rows],
                "exact": arrays["exact"][rows],
                "selected": rank[rows] >= 0,
                "rank": pa.array(rank[rows], mask=rank[rows] < 0),
            }
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="winnow select", description="Select samples without servers.")
    parser.add_argument("--model", type=Path, required=True, help="a folder with config, tokenizer and safetensors")
    parser.add_argument("--pool", type=Path, required=True, help="JSONL, JSONL.gz or Parquet")
    parser.add_argument("--target", type=Path, required=True, help="the same, of examples of what is wanted")
    parser.add_argument("--budget", required=True, help="samples to select: a number, or a fraction between 0 and 1")
    parser.add_argument("--out", type=Path, required=True, help="ends in .jsonl, .csv or .parquet")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter: landmarks.count=256"
    )
    parser.add_argument("--selected-only", action="store_true", help="write the selection alone")
    parser.add_argument(
        "--cache", type=Path, help="keeps embeddings and gradients for the next run; default: nothing is kept"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", action="store_true", help="print the fidelity and counts as JSON")
    return parser


def _parameters(settings: list[str]) -> Parameters:
    """The parameters by name, checked as the service checks them."""
    try:
        given = assigned(settings)
    except ValueError as error:
        raise ParameterError(str(error)) from error
    try:
        return Parameters(**given)
    except ValidationError as error:
        refused = [field_error(e) for e in error.errors()]
        raise ParameterError("\n  ".join(f"--set {each['param']}: {each['message']}" for each in refused)) from error


def _budget(text: str, rows: int) -> int:
    try:
        value = read_budget(text)
    except ValueError as error:
        raise ParameterError(str(error)) from error
    if isinstance(value, float) and 0 < value < 1:
        value = max(1, round(value * rows))
    if not isinstance(value, int) or value < 1:
        raise ParameterError(f"--budget {text}: a number of samples, or a fraction between 0 and 1")
    if value > rows:
        raise ParameterError(f"--budget {text}: the pool has {rows} samples")
    return value


@contextmanager
def _store(cache: Path | None) -> Iterator[ArtifactStore]:
    if cache is not None:
        yield ArtifactStore(str(cache.resolve()))
        return
    with scratch(temporary_folder()) as folder:
        yield ArtifactStore(str(folder))


def _run(arguments: argparse.Namespace, console: Console) -> None:
    if problems := unsafe_packages():
        raise ParameterError("; ".join(problems))
    if arguments.out.suffix not in _ENCODERS:
        raise ParameterError(f"--out {arguments.out}: the name must end in one of {', '.join(_ENCODERS)}")
    if not any((arguments.model / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise ParameterError(f"--model {arguments.model}: no folder with a config.json or {ADAPTER_CONFIG}")
    parameters = _parameters(arguments.set)
    folder = arguments.model.resolve()
    # The base of an adapter lies beside it, as among the service's registered models.
    # Nobody else decides what this machine takes from the hub.
    model = resolve(ModelSettings(folder=folder.parent, hub=("*/*",)), folder.name, parameters)
    columns = TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with _store(arguments.cache) as store, Progress(*columns, console=console) as progress:
        store.sweep_scratch()
        pool, target = _register(store, arguments.pool), _register(store, arguments.target)
        try:
            settings = WorkerSettings(device=arguments.device)
            compute = Compute(artifacts=store.url, models=folder.parent, settings=settings)
        except RuntimeError as error:
            raise ParameterError(f"--device {arguments.device}: {error}") from error
        job = JobInputs(
            model=model,
            pool=pool.fingerprint,
            target=target.fingerprint,
            budget=_budget(arguments.budget, pool.row_count),
            parameters=parameters.model_dump(mode="json"),
        )
        done = LocalJob(compute, job, progress).run(pool.row_count + target.row_count)
        with store.local(done[Stage.SELECT][0].artifact_key) as path:
            arrays = load_file(path)
        _write(arguments.out, store, pool.fingerprint, arrays, arguments.selected_only)
        computed = {stage: [unit.result for unit in units] for stage, units in done.items()}
        nonfinite = summary.nonfinite(store, pool.fingerprint, target.fingerprint, computed)
    found = {**summary.of_method(computed), "nonfinite": nonfinite}
    if arguments.json:
        print(json.dumps({**found, "prepared": done[Stage.PREPARE][0].result, "budget": job.budget}))
        return
    count = len(arrays["selected"])
    console.print(f"Selected {count} of {pool.row_count} samples; wrote {arguments.out}.", soft_wrap=True)
    for sentence in found["sentences"]:
        console.print(sentence, soft_wrap=True)
    for name, left_out in nonfinite.items():
        for sample in left_out["samples"]:
            console.print(f"Not finite, of the {name}: {sample['id']}", soft_wrap=True, markup=False)


def main() -> None:
    arguments = _parser().parse_args()
    try:
        _run(arguments, Console(stderr=arguments.json))
    except (UnitError, ApiError) as error:
        more = [f"\n  {e['param']}: {e['message']}" for e in getattr(error, "errors", None) or []]
        sys.exit(f"winnow select: {error.detail}{''.join(more)}")
    except OSError as error:
        sys.exit(f"winnow select: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
