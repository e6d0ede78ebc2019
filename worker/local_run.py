"""`winnow select`: the whole job in one process, without servers. The same stages, artifacts and shards as the service."""

import gzip
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from safetensors.numpy import load_file

from service.datasets import storage
from service.datasets.bad_rows import OnBadRow
from service.datasets.convert import convert
from service.http.errors import ApiError
from service.models.configs import ADAPTER_CONFIG
from service.models.dependency_check import unsafe_packages
from service.models.registry import resolve
from service.plan.preparing import is_shard, prepare_unit
from service.plan.rates import Rates
from service.plan.stages import Done, JobInputs, Stage, UnitSpec
from service.plan.waves import next_units
from service.results import formats
from service.settings import ModelSettings, UploadSettings, WorkerSettings
from service.storage.artifacts import ArtifactStore
from service.storage.tempdirs import temporary_directory
from winnow import render
from winnow.options import Reading, read_budget
from worker import chosen, costs, summary, verdict
from worker.artifact_cache import known_result
from worker.errors import ArtifactUnusable, ParameterError, UnitError, check_shards
from worker.given_options import parameters_of, row_options_of
from worker.loading.model_shape import shape_in_files
from worker.process.main import Compute

_MAX_TRIES = 5
_AS_IT_IS = Reading()
_ENCODERS = {".jsonl": formats.jsonl, ".csv": formats.comma_separated, ".parquet": formats.parquet}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of the command; `worker.commands` describes them."""

    model: Path
    pool: Path
    target: Path
    budget: str
    out: Path
    given: dict[str, str]
    settings: list[str]
    selected_only: bool
    cache: Path | None
    device: str
    as_json: bool
    reading: Reading
    target_reading: Reading


class LocalJob:
    """A job's stages, run one after the other in this process; planned as the service plans them."""

    def __init__(self, compute: Compute, job: JobInputs, progress: Progress) -> None:
        self._compute = compute
        self._job = job
        self._progress = progress

    def run(self, rows: int) -> dict[Stage, list[Done]]:
        """Runs all stages; returns their finished units."""
        wave = [prepare_unit("local", rows)]
        done: dict[Stage, list[Done]] = {}
        while wave:
            for stage, units in groupby(wave, key=attrgetter("stage")):
                finished = self._stage(list(units), done)
                done.setdefault(stage, []).extend(finished)
            wave = next_units(self._job, done)
        return done

    def _stage(self, units: list[UnitSpec], done: Mapping[Stage, list[Done]]) -> list[Done]:
        bar = self._progress.add_task(units[0].stage, total=sum(unit.total for unit in units))
        finished, before = [], 0
        for unit in units:
            result = self._unit(unit, done, partial(self._advance, bar, before))
            finished.append(Done(artifact_key=unit.artifact_key, spec=unit.spec, result=result))
            before += result.get("samples_done", unit.total)
            self._progress.update(bar, completed=before)
            if is_shard(unit.spec):
                check_shards(self._job.parameters, ((each.spec["dataset"], each.result) for each in finished))
        self._progress.stop_task(bar)
        return finished

    def _advance(self, bar: TaskID, before: int, done: int) -> None:
        self._progress.update(bar, completed=before + done)

    def _unit(self, unit: UnitSpec, done: Mapping[Stage, list[Done]], report: Callable[[int], None]) -> dict[str, Any]:
        is_found = unit.stage != Stage.PREPARE or is_shard(
            unit.spec
        )  # by what it depends on; the others are of one job
        if is_found and (known := known_result(self._compute.store, unit.artifact_key)) is not None:
            return known
        message = {
            "stage": unit.stage,
            "artifact_key": unit.artifact_key,
            "spec": unit.spec,
            "job": self._job.as_dict(),
            "prepared": done[Stage.PREPARE][-1].result if done else {},
            "halvings": 0,
        }
        return self._compute.run(message, report, lambda *_: None)


def _stages(job: LocalJob, rows: int) -> dict[Stage, list[Done]]:
    """All stages; what the cache holds damaged is set aside, and made again by the next try."""
    for _ in range(_MAX_TRIES - 1):
        with suppress(ArtifactUnusable):
            return job.run(rows)
    return job.run(rows)


def _register(
    store: ArtifactStore, file: Path, reading: Reading = _AS_IT_IS, report: Path | None = None
) -> storage.Content:
    """Converts the file; where the reading allows for rows to be left out, `report` is where they are named."""
    options = row_options_of(reading)
    on_bad_row = OnBadRow(reading.on_bad_row or OnBadRow.REFUSE)
    with temporary_directory() as folder, file.open("rb") as source:
        content = convert(source, options, UploadSettings(), folder, file.name, on_bad_row)
        storage.publish(store, content)
        if content.report is not None and report is not None:
            with gzip.open(content.report) as packed, report.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    return content


def _files(store: ArtifactStore, options: Options, console: Console) -> Iterator[storage.Content]:
    """Pool and target; says what was taken of their files."""
    given = ("pool", options.pool, options.reading), ("target", options.target, options.target_reading)
    for name, file, reading in given:
        report = options.out.with_name(f"{options.out.name}.{name}-skipped.jsonl")
        content = _register(store, file, reading, report)
        lines = [f"{file}: {content.row_count:,} rows", *render.detection(content.detected or {})]
        if content.skipped:
            lines.append(f"  left out: {content.skipped:,} rows that cannot be used, see {report}")
        for line in lines:
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        yield content


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
                "influence": formats.masked(arrays["influence"][rows]),
                "weight": arrays["weight"][rows],
                "exact": arrays["exact"][rows],
                "selected": rank[rows] >= 0,
                "rank": pa.array(rank[rows], mask=rank[rows] < 0),
            }
        )


def _budget(text: str, rows: int) -> int:
    try:
        value = read_budget(text)
    except ValueError as error:
        raise ParameterError(str(error)) from error
    if isinstance(value, float) and 0 < value < 1:
        value = max(1, round(value * rows))
    if not isinstance(value, int) or value < 1:
        raise ParameterError(f"--budget {text}: expected a number of samples, or a fraction between 0 and 1")
    if value > rows:
        raise ParameterError(f"--budget {text}: the pool has {rows} samples")
    return value


def _run(options: Options, folder: Path, console: Console) -> None:
    if problems := unsafe_packages():
        raise ParameterError("; ".join(problems))
    if options.out.suffix not in _ENCODERS:
        raise ParameterError(f"--out {options.out}: the name must end in one of {', '.join(_ENCODERS)}")
    if not any((options.model / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise ParameterError(f"--model {options.model}: no folder with a config.json or {ADAPTER_CONFIG}")
    parameters = parameters_of(options.settings, options.given)
    model_folder = options.model.resolve()
    # The base of an adapter lies beside it, as among the service's registered models.
    # Nobody else decides what this machine takes from the hub.
    model = resolve(ModelSettings(folder=model_folder.parent, hub=("*/*",)), model_folder.name, parameters)
    columns = TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    store = ArtifactStore(str(folder))
    with Progress(*columns, console=console) as progress:
        store.remove_abandoned()
        pool, target = _files(store, options, console)
        try:
            settings = WorkerSettings(device=options.device)
            compute = Compute(artifacts=store.url, models=model_folder.parent, settings=settings)
        except RuntimeError as error:
            raise ParameterError(f"--device {options.device}: {error}") from error
        job = JobInputs(
            model=model,
            pool=pool.fingerprint,
            target=target.fingerprint,
            budget=_budget(options.budget, pool.row_count),
            parameters=parameters.model_dump(mode="json"),
        )
        done = _stages(LocalJob(compute, job, progress), pool.row_count + target.row_count)
        with store.local(done[Stage.SELECT][0].artifact_key) as path:
            arrays = load_file(path)
        _write(options.out, store, pool.fingerprint, arrays, options.selected_only)
        computed = {stage: [unit.result for unit in units] for stage, units in done.items()}
        nonfinite = summary.nonfinite(store, pool.fingerprint, target.fingerprint, done[Stage.SELECT][0].result)
        selected = arrays["selected"]
        ids, sources = chosen.names(store, pool.fingerprint, selected)
        prepared = done[Stage.PREPARE][-1].result
        said = chosen.read(store, job, prepared, selected, ids)
    unusable = prepared["unusable"]
    found = summary.of_method(computed)
    cost = costs.of_job(shape_in_files(compute.models.folder(job.model)), job, computed, found, Rates())
    found |= {
        **said,
        "costs": cost,
        "unusable": unusable,
        "nonfinite": nonfinite,
        "rendering": prepared["rendering"],
        "sources": chosen.by_source(sources, arrays["weight"][selected], pool.sources),
        "pool": prepared["pool_counts"],
        "target": prepared["target_counts"],
        "chat_template": prepared["chat_template"],
    }
    found["verdict"] = verdict.of(found)
    if options.as_json:
        print(json.dumps({**found, "prepared": prepared, "budget": job.budget}))
        return
    console.print(f"Selected {len(selected)} of {pool.row_count} samples; wrote {options.out}.", soft_wrap=True)
    render.verdict(console, found["verdict"])
    for sentence in (*found["sentences"], *render.costs(cost)):
        console.print(sentence, soft_wrap=True)
    for name, left_out in unusable.items():
        for row in left_out["first"]:
            console.print(f"Unusable in the {name}: {row['id']}: {row['detail']}", soft_wrap=True, markup=False)
    for name, left_out in nonfinite.items():
        for sample in left_out["samples"]:
            console.print(f"Not finite in the {name}: {sample['id']}", soft_wrap=True, markup=False)


def main(options: Options) -> None:
    """Ends the program with a message where the job cannot be done."""
    # Without a cache, nothing is kept.
    folder = temporary_directory() if options.cache is None else nullcontext(options.cache.resolve())
    try:
        with folder as path:
            _run(options, path, Console(stderr=options.as_json))
    except (UnitError, ApiError) as error:
        more = [f"\n  {e['param']}: {e['message']}" for e in getattr(error, "errors", None) or []]
        sys.exit(f"winnow select: {error.detail}{''.join(more)}")
    except OSError as error:
        sys.exit(f"winnow select: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
