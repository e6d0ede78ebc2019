"""Select: from the influence on each target to the selection and its weights; and a second one from half of the targets.

Where a shortlist was refined, the choice is made among samples of exact influence only.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from service.plan.limits import KERNEL_ROWS
from worker.duplicates import exclusions
from worker.errors import DataError
from worker.influence import (
    WeightedSolution,
    mean_one_over_selected,
    offset_influence,
    quadratic_factors,
    round_robin,
    top_k,
    turn_order,
    weighted_selection,
)
from worker.stages.context import StageContext
from worker.stages.exact_rows import (
    Rows,
    eligible_samples,
    gradient_keys,
    nonfinite,
    split_targets,
    valid_targets,
)
from worker.stages.rounds import columns, mean_influence
from worker.text import token_files

NOT_FINITE = "not_finite"
"""Beside the reasons of unusable rows, that of a sample without a finite loss, gradient or embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """What the choice is made among. `rows` (m,) are their places in the pool, `P_mx` their columns (`Measure.rows`)."""

    rows: Rows
    P_mx: npt.NDArray[np.float32]
    eligible: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """Selected rows of the pool, the best first, and the weight of each, mean 1."""

    selected: Rows
    weight: npt.NDArray[np.float64]
    solution: WeightedSolution | None = None


def run(context: StageContext, artifact_key: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Writes `influence`, `weight` float32 (n,), `exact`, `eligible` bool (n,), `selected` int64 in rank order; and of the choice
    from half of the targets `held_out_selected`, `held_out_weight` and `held_out_targets`, empty where there are too few targets.
    The influence of samples that are not eligible is NaN, and `reason`, uint8 (n,), says why: the place in `reasons` of the
    result, from 1 on. `selected_on_targets`, float32 (t,): the mean influence of the selected on each target. Of a choice by
    round robin the result has the targets in the order of their `turns`."""
    store, job, t = context.store, context.job, context.prepared["t"]
    measured = [*gradient_keys(spec["landmarks"]), *gradient_keys(spec["refined"]), *spec["embeddings"]]
    eligible = eligible_samples(context, measured)
    solution, valid, turns = None, np.arange(t), None
    if job.parameters["method"] == "random":  # nothing is known of any sample's influence, which is given as 0
        generator = np.random.default_rng([job.parameters["seed"], 0x5EED])
        selected = generator.choice(np.flatnonzero(eligible), size=job.budget, replace=False)
        choice, none = _Choice(selected=selected, weight=np.ones(len(selected))), np.zeros(len(eligible))
        tensors = _tensors(none, none.astype(bool), choice, None, np.empty(0, np.int64))
    else:
        valid = valid_targets(context, spec["target_units"])
        if not len(valid):
            raise DataError("No target sample has a finite gradient or embedding: there is nothing to select for.")
        tensors, solution = _from_influence(context, spec, eligible, valid)
        if job.parameters["selection"] == "round_robin":
            turns = valid[turn_order(len(valid), job.parameters["seed"])].tolist()
    tensors["influence"][~eligible] = np.nan
    reason, reasons = _reasons(context, eligible)
    with store.writing(artifact_key) as path:
        save_file({**tensors, "eligible": eligible, "reason": reason}, path)
    context.report(context.prepared["n"])
    return {
        "reasons": reasons,
        "turns": turns,
        "solution": solution and {f.name: getattr(solution, f.name) for f in fields(solution) if f.name != "weights"},
        "nonfinite": nonfinite(store, measured),
        "nonfinite_targets": nonfinite(store, spec["target_units"]),
        "excluded_targets": np.setdiff1d(np.arange(t), valid).tolist(),
        "eligible": int(eligible.sum()),
    }


def _reasons(context: StageContext, eligible: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Why each sample is not eligible: 0, or the place in the list of reasons, from 1 on."""
    unusable = token_files.read_counts(context.store, context.prepared["pool_tokens"]).unusable
    numbers = exclusions.read(context.store, context.prepared)
    reasons = [*unusable, NOT_FINITE, *(() if numbers is None else exclusions.REASONS)]
    not_finite = len(unusable) + 1
    reason = np.where(eligible, 0, not_finite).astype(np.uint8)
    if numbers is not None:
        reason[numbers > 0] = not_finite + numbers[numbers > 0]
    for number, rows in enumerate(unusable.values(), 1):
        reason[rows] = number
    return reason, reasons


def _tensors(
    influence: npt.NDArray[np.float64],
    exact: npt.NDArray[np.bool_],
    choice: _Choice,
    half: _Choice | None,
    held_out: Rows,
) -> dict[str, npt.NDArray[Any]]:
    weight = np.zeros(len(influence), dtype=np.float32)
    weight[choice.selected] = choice.weight
    return {
        "influence": influence.astype(np.float32),
        "weight": weight,
        "exact": exact,
        "selected": choice.selected.astype(np.int64),
        "held_out_selected": np.empty(0, np.int64) if half is None else half.selected.astype(np.int64),
        "held_out_weight": np.empty(0, np.float32) if half is None else half.weight.astype(np.float32),
        "held_out_targets": held_out,
    }


def _from_influence(
    context: StageContext,
    spec: dict[str, Any],
    eligible: npt.NDArray[np.bool_],
    valid: Rows,
) -> tuple[dict[str, npt.NDArray[Any]], WeightedSolution | None]:
    with context.store.local(spec["influence"]) as path:
        P_nx: npt.NDArray[np.float32] = np.load(path, mmap_mode="r")
        candidates, exact = _candidates(context, spec, P_nx, eligible)
        influence = mean_influence(P_nx, valid)
        choice = _choose(context, spec, candidates, valid)
        held_in, held_out = split_targets(context, valid)
        half = _choose(context, spec, candidates, held_in, is_half=True) if len(held_out) else None
        on_targets = _mean_of_rows(P_nx, choice.selected, context.prepared["t"])
    tensors = _tensors(influence, exact, choice, half, held_out)
    return {**tensors, "selected_on_targets": on_targets}, choice.solution


def _mean_of_rows(P_nx: npt.NDArray[np.float32], rows: Rows, targets: int) -> npt.NDArray[np.float32]:
    """The mean of those rows on the targets, (t,), a block of rows at a time."""
    total, rising = np.zeros(targets), np.sort(rows)
    for start in range(0, len(rows), KERNEL_ROWS):
        total += P_nx[rising[start : start + KERNEL_ROWS], :targets].sum(axis=0, dtype=np.float64)
    return (total / len(rows)).astype(np.float32)


def _candidates(
    context: StageContext,
    spec: dict[str, Any],
    P_nx: npt.NDArray[np.float32],
    eligible: npt.NDArray[np.bool_],
) -> tuple[_Candidates, npt.NDArray[np.bool_]]:
    """Among what to choose, and which samples' influence is exact, bool (n,)."""
    n, exact = len(P_nx), np.zeros(len(P_nx), dtype=bool)
    if context.job.parameters["method"] == "rds_plus":
        return _Candidates(rows=np.arange(n), P_mx=P_nx, eligible=eligible), eligible
    for round_ in (*spec["landmarks"], *spec["refined"]):
        exact[token_files.read_indices(context.store, round_["tokens"])] = True
    exact &= eligible
    if not spec["refined"]:
        return _Candidates(rows=np.arange(n), P_mx=P_nx, eligible=eligible), exact
    chosen = np.flatnonzero(exact)
    if len(chosen) < context.job.budget:
        raise DataError(
            f"budget is {context.job.budget}, but only {len(chosen)} samples have a finite exact influence; lower it."
        )
    return _Candidates(rows=chosen, P_mx=P_nx[chosen], eligible=np.ones(len(chosen), dtype=bool)), exact


def _choose(
    context: StageContext, spec: dict[str, Any], among: _Candidates, targets: Rows, *, is_half: bool = False
) -> _Choice:
    parameters, budget = context.job.parameters, context.job.budget
    if parameters["selection"] == "weighted":
        return _weigh(context, spec, among, targets, is_half=is_half)
    if parameters["selection"] == "round_robin":
        P_mt = columns(among.P_mx, targets)
        chosen = round_robin(P_mt, budget, seed=parameters["seed"], eligible=among.eligible)
    else:
        chosen = top_k(mean_influence(among.P_mx, targets), budget, eligible=among.eligible)
    return _Choice(selected=among.rows[chosen], weight=np.ones(budget))


def _weigh(context: StageContext, spec: dict[str, Any], among: _Candidates, targets: Rows, *, is_half: bool) -> _Choice:
    """The weights of METHOD 1. All that they are made of, curvature included, is of these targets: all, or those held in."""
    parameters, t = context.job.parameters, context.prepared["t"]
    kind, rate = parameters["curvature"]["type"], parameters["optimizer"]["learning_rate"]
    places = np.flatnonzero(among.eligible)
    P_mt = torch.from_numpy(columns(among.P_mx, targets)[places].astype(np.float64))
    p_m, factors = P_mt.mean(dim=1), None
    terms = {}
    if spec["curvature"]:
        with context.store.local(spec["curvature"]) as path:
            terms = load_file(path)
    if kind == "fisher":
        factors = quadratic_factors("fisher", n=len(places), P_nt=P_mt)
        if terms:
            p_m = p_m - rate * offset_influence("fisher", P_nt=P_mt, Gb_t=terms["Gb"][targets])
    elif kind != "none":
        of, r = int(is_half), terms["M"].shape[-1]
        curved_mx = torch.from_numpy(among.P_mx[places, t:].astype(np.float64))
        factors = quadratic_factors(kind, n=len(places), B_nr=curved_mx[:, :r], M_rr=terms["M"][of])
        if "Hb" in terms:
            p_m = p_m - rate * curved_mx[:, r + of]
    solution = weighted_selection(
        p_m.numpy(),
        budget=context.job.budget,
        factors=None if factors is None else (factors[0].numpy(), factors[1].numpy()),
        learning_rate=rate,
    )
    weight = mean_one_over_selected(solution.weights)
    support = np.flatnonzero(weight)
    best = support[np.argsort(-weight[support], kind="stable")]
    return _Choice(selected=among.rows[places[best]], weight=weight[best], solution=solution)
