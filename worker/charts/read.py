"""All charts of a job, from the artifacts of its stages."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from service.datasets.storage import read_ids
from service.plan.stages import Done, History, JobInputs, Stage
from service.results.chart_schemas import (
    MAX_NAMED_PICKS,
    MAX_PAIRS,
    MAX_TARGETS,
    Charts,
    LeftOutPairs,
    ShortlistPairs,
    StageChart,
    TargetChart,
    Targets,
)
from service.storage.artifacts import ArtifactStore
from worker.charts.pool import budgets, influence_bins, length_bins, sources
from worker.charts.sample_map import sample_map
from worker.charts.samples import PoolSamples, even_part, figures, rounded


def read(store: ArtifactStore, job: JobInputs, done: History, arrays: Mapping[str, npt.NDArray[Any]]) -> Charts:
    """All but the stages, which the ledger knows.

    Args:
        done: all units of the job; `arrays`: what its select stage wrote.
    """
    prepared, propagated = done[Stage.PREPARE][-1].result, done.get(Stage.PROPAGATE, ())
    has_influence = job.parameters["method"] != "random"
    samples = PoolSamples.read(store, job.pool, prepared["pool_tokens"], arrays, has_influence=has_influence)
    on_targets = (propagated[-1].artifact_key, prepared["t"]) if propagated else None
    return Charts(
        influence=influence_bins(samples),
        landmarks=_landmarks(store, samples, propagated),
        shortlist=_shortlist(samples, propagated),
        sources=sources(samples),
        lengths=length_bins(samples),
        targets=_targets(store, job, done, arrays),
        map=sample_map(store, samples, done.get(Stage.EMBED, ()), on_targets, job.parameters["seed"]),
        budgets=budgets(samples, job.parameters["selection"]),
        stages=[],
    )


def stages(spent: Sequence[Mapping[str, Any]], plan: Mapping[str, Any] | None) -> list[StageChart]:
    """
    Args:
        spent: of each stage of the job, as in its summary.
        plan: the last one that was made, None where there is none.
    """
    planned = {each["stage"]: each["seconds"] for each in (plan or {"stages": ()})["stages"]}
    by_stage = {each["stage"]: each for each in spent}
    return [
        StageChart(
            stage=stage,
            planned_seconds=planned.get(stage),
            **{
                name: by_stage.get(stage, {}).get(name, 0)
                for name in ("wall_seconds", "compute_seconds", "units", "reused")
            },
        )
        for stage in Stage
        if stage in planned or stage in by_stage
    ]


def _landmarks(store: ArtifactStore, samples: PoolSamples, propagated: Sequence[Done]) -> LeftOutPairs | None:
    key = propagated[-1].result.get("explanation") if propagated else None
    if key is None:
        return None
    with store.local(key) as path:
        found = load_file(path)
    if "left_out" not in found:  # propagated by the version before
        return None
    shown = even_part(np.arange(len(found["landmarks"])), MAX_PAIRS)
    index = found["landmarks"][shown]
    return LeftOutPairs(
        count=len(found["landmarks"]),
        index=index.tolist(),
        predicted=figures(found["left_out"][shown]),
        exact=figures(samples.influence[index]),
    )


def _shortlist(samples: PoolSamples, propagated: Sequence[Done]) -> ShortlistPairs | None:
    """Of every round; a sample whose gradient turned out not to be finite has no pair."""
    rounds = [each.result["shortlist"] for each in propagated if each.result.get("shortlist")]
    if not rounds or not all("predicted" in each for each in rounds):  # of the version before
        return None
    index = np.concatenate([each["predicted"]["index"] for each in rounds]).astype(np.int64)
    before = np.concatenate([each["predicted"]["influence"] for each in rounds])
    shown = even_part(np.flatnonzero(samples.exact[index]), MAX_PAIRS)
    if not len(shown):
        return None
    return ShortlistPairs(
        count=sum(each["count"] for each in rounds),
        index=index[shown].tolist(),
        before=figures(before[shown]),
        after=figures(samples.influence[index[shown]]),
    )


def _targets(store: ArtifactStore, job: JobInputs, done: History, arrays: Mapping[str, npt.NDArray[Any]]) -> Targets:
    prepared, selected = done[Stage.PREPARE][-1].result, done[Stage.SELECT][-1].result
    count = prepared["t"]
    ids, _ = read_ids(store, job.target, 0, MAX_TARGETS)
    excluded, on_targets = set(selected["excluded_targets"]), arrays.get("selected_on_targets")
    fidelity: Mapping[str, Sequence[float | None]] = {"r2": (), "spearman": ()}
    if propagated := done.get(Stage.PROPAGATE):
        fidelity = propagated[-1].result["fidelity"] or fidelity
    valid = [target for target in range(count) if target not in excluded]
    known = {
        name: dict(zip(valid, fidelity[name], strict=True)) if fidelity[name] else {} for name in ("r2", "spearman")
    }
    turns: Sequence[int] | None = selected.get("turns")
    turn_of = {target: turn for turn, target in enumerate(turns or ())}
    named = max(1, MAX_NAMED_PICKS // max(len(turn_of), 1))
    chosen = arrays["selected"]

    def chart(target: int, name: str) -> TargetChart:
        turn = turn_of.get(target)
        picks = chosen[turn :: len(turn_of)] if turn is not None else chosen[:0]
        values = {key: values.get(target) for key, values in known.items()}
        mean = None if on_targets is None or target in excluded else rounded(on_targets[target])
        return TargetChart(
            index=target,
            id=name,
            counts=target not in excluded,
            **{key: None if value is None else rounded(value) for key, value in values.items()},
            influence=mean,
            turn=turn if len(picks) else None,
            took=None if turns is None else len(picks),
            first=picks[:named].tolist(),
        )

    data = [chart(target, name) for target, name in enumerate(ids)]
    return Targets(count=count, turns=None if turns is None else len(turn_of), data=data)
