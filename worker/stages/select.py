"""Select: from the influence on each target to the selection and its weights; and once more from half of the targets.

Where a shortlist was refined, the choice is made among samples of exact influence only.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from worker import data
from worker.errors import DataError
from worker.influence import (
    WeightedSolution,
    mean_one_over_selected,
    offset_influence,
    quadratic_factors,
    round_robin,
    top_k,
    weighted_selection,
)
from worker.stages.context import StageContext
from worker.stages.influence import (
    Measure,
    check_nonfinite,
    eligible_samples,
    exact_rows,
    gradient_keys,
    nonfinite,
    speaking_targets,
)
from worker.stages.propagate import columns, mean_influence

_HELD_OUT_FROM = 16  # targets; of fewer, half say too little
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """What the choice is made among. `rows` (m,) are their places in the pool, `P_mc` their columns (`Measure.rows`)."""

    rows: Rows
    P_mc: npt.NDArray[np.float32]
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
    The shortlist's exact influence on each target stands beside it, which the result names as `explanation`."""
    measured = [*gradient_keys(spec["landmarks"]), *gradient_keys(spec["refined"]), *spec["embeddings"]]
    eligible = eligible_samples(context, measured)
    if context.job.parameters["method"] == "random":
        tensors, solution, speaking, refined = _draw(context, eligible), None, np.arange(context.prepared["t"]), None
    else:
        speaking, refined = _targets(context, spec), _refined(context, spec)
        tensors, solution = _from_influence(context, spec, eligible, speaking, refined)
    with context.store.writing(artifact_key) as path:
        save_file({**tensors, "eligible": eligible}, path)
    context.report(context.prepared["n"])
    return {
        "solution": None if solution is None else _certificate(solution),
        "nonfinite": nonfinite(context.store, measured),
        "nonfinite_targets": nonfinite(context.store, spec["target_units"]),
        "silent_targets": np.setdiff1d(np.arange(context.prepared["t"]), speaking).tolist(),
        "explanation": None if refined is None else _write_explanation(context, artifact_key, *refined),
        "eligible": int(eligible.sum()),
    }


def _certificate(solution: WeightedSolution) -> dict[str, Any]:
    """All that the solver says of its weights."""
    return {field.name: getattr(solution, field.name) for field in fields(solution) if field.name != "weights"}


def _draw(context: StageContext, eligible: npt.NDArray[np.bool_]) -> dict[str, npt.NDArray[Any]]:
    """Uniformly from the seed; nothing is known of any sample's influence, which is given as 0."""
    generator = np.random.default_rng([context.job.parameters["seed"], 0x5EED])
    selected = generator.choice(np.flatnonzero(eligible), size=context.job.budget, replace=False)
    choice = _Choice(selected=selected, weight=np.ones(len(selected)))
    return _tensors(np.zeros(len(eligible)), np.zeros(len(eligible), dtype=bool), choice, None, np.empty(0, np.int64))


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


def _refined(context: StageContext, spec: dict[str, Any]) -> tuple[Rows, npt.NDArray[np.float32]] | None:
    """The shortlist's rows of the pool, rising, and their exact columns."""
    if not spec["refined"]:
        return None
    _check_shortlist(context, spec)
    rows, P_rc = exact_rows(context.store, Measure.load(context, spec), spec["refined"])
    return rows, P_rc.numpy()


def _write_explanation(context: StageContext, artifact_key: str, rows: Rows, P_rc: npt.NDArray[np.float32]) -> str:
    key = f"{artifact_key}.refined.safetensors"
    with context.store.writing(key) as path:
        save_file({"index": rows, "influence": np.ascontiguousarray(P_rc[:, : context.prepared["t"]])}, path)
    return key


def _from_influence(
    context: StageContext,
    spec: dict[str, Any],
    eligible: npt.NDArray[np.bool_],
    speaking: Rows,
    refined: tuple[Rows, npt.NDArray[np.float32]] | None,
) -> tuple[dict[str, npt.NDArray[Any]], WeightedSolution | None]:
    with context.store.local(spec["influence"]) as path:
        P_nc: npt.NDArray[np.float32] = np.load(path, mmap_mode="r")
        candidates, exact = _candidates(context, spec, P_nc, eligible, refined)
        influence = mean_influence(P_nc, speaking)
        if refined is not None:
            influence[candidates.rows] = mean_influence(candidates.P_mc, speaking)
        influence[~eligible] = 0.0
        choice = _choose(context, spec, candidates, speaking)
        half, held_out = None, np.empty(0, np.int64)
        if len(speaking) >= _HELD_OUT_FROM:
            generator = np.random.default_rng([context.job.parameters["seed"], 0x4A1F])
            held_out = np.sort(generator.choice(speaking, size=len(speaking) // 2, replace=False))
            half = _choose(context, spec, candidates, np.setdiff1d(speaking, held_out))
    return _tensors(influence, exact, choice, half, held_out), choice.solution


def _targets(context: StageContext, spec: dict[str, Any]) -> Rows:
    speaking = speaking_targets(context, spec["target_units"])
    if not len(speaking):
        raise DataError("No target sample has a finite gradient or embedding: there is nothing to select for.")
    return speaking


def _candidates(
    context: StageContext,
    spec: dict[str, Any],
    P_nc: npt.NDArray[np.float32],
    eligible: npt.NDArray[np.bool_],
    refined: tuple[Rows, npt.NDArray[np.float32]] | None,
) -> tuple[_Candidates, npt.NDArray[np.bool_]]:
    """Among what to choose, and which samples' influence is exact, bool (n,)."""
    n, exact = len(P_nc), np.zeros(len(P_nc), dtype=bool)
    if context.job.parameters["method"] == "rds_plus":
        return _Candidates(rows=np.arange(n), P_mc=P_nc, eligible=eligible), eligible
    for round_ in spec["landmarks"]:
        exact[data.read_indices(context.store, round_["tokens"])] = True
    exact &= eligible
    if refined is None:
        return _Candidates(rows=np.arange(n), P_mc=P_nc, eligible=eligible), exact
    rows, P_rc = refined
    exact[rows] = True
    chosen = np.flatnonzero(exact)
    P_mc = P_nc[chosen]
    P_mc[np.searchsorted(chosen, rows)] = P_rc
    if len(chosen) < context.job.budget:
        raise DataError(
            f"budget is {context.job.budget}, but only {len(chosen)} samples have a finite exact influence; lower it."
        )
    return _Candidates(rows=chosen, P_mc=P_mc, eligible=np.ones(len(chosen), dtype=bool)), exact


def _check_shortlist(context: StageContext, spec: dict[str, Any]) -> None:
    total = sum(len(data.read_indices(context.store, round_["tokens"])) for round_ in spec["refined"])
    wrong = nonfinite(context.store, gradient_keys(spec["refined"]))
    check_nonfinite(context, context.job.pool, wrong, total, "shortlisted samples")


def _choose(context: StageContext, spec: dict[str, Any], among: _Candidates, targets: Rows) -> _Choice:
    parameters, budget = context.job.parameters, context.job.budget
    if parameters["selection"] == "weighted":
        return _weigh(context, spec, among, targets)
    if parameters["selection"] == "round_robin":
        P_mt = columns(among.P_mc, targets)
        chosen = round_robin(P_mt, budget, seed=parameters["seed"], eligible=among.eligible)
    else:
        chosen = top_k(mean_influence(among.P_mc, targets), budget, eligible=among.eligible)
    return _Choice(selected=among.rows[chosen], weight=np.ones(budget))


def _weigh(context: StageContext, spec: dict[str, Any], among: _Candidates, targets: Rows) -> _Choice:
    """The weights of METHOD 1. The quadratic form of `ggn` and `hessian` is of all targets, whatever `targets` says."""
    parameters, t = context.job.parameters, context.prepared["t"]
    kind, rate = parameters["curvature"]["type"], parameters["optimizer"]["learning_rate"]
    places = np.flatnonzero(among.eligible)
    P_mt = torch.from_numpy(columns(among.P_mc, targets)[places].astype(np.float64))
    p_m, factors = P_mt.mean(dim=1), None
    terms = {}
    if spec["curvature"]:
        with context.store.local(spec["curvature"]) as path:
            terms = load_file(path)
    if kind == "fisher":
        factors = quadratic_factors("fisher", n=len(places), P_nt=P_mt)
        if terms:
            p_m = p_m - rate * offset_influence("fisher", P_nt=P_mt, slopes_t=terms["target_drift"][targets])
    elif kind != "none":
        curved_mr = torch.from_numpy(among.P_mc[places, t:].astype(np.float64))
        factors = quadratic_factors(kind, n=len(places), B_nr=curved_mr[:, :-1], M_rr=terms["M"])
        p_m = p_m - rate * curved_mr[:, -1]
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
