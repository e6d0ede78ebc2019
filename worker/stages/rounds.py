"""Refine in rounds: whether the exact samples suffice for the selection, and if not, whose gradients come next."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.plan.limits import KERNEL_ROWS
from service.plan.passes import is_capped
from service.plan.shards import gradient_shards
from worker.influence import Residuals, promise, shortlist
from worker.stages.context import StageContext
from worker.text import token_files

_COMPARED = 2000  # samples over all rounds whose prediction is kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a propagation knows. `P_nx` (n, x): exact in the rows `exact` (e,), predicted in the others; `valid` (v,) are its
    columns that count, and `P_et`, `left_out_et` (e, v) those of the exact rows and of their leave-one-out predictions. `tried`:
    how many samples were refined so far, with those that turned out not to be finite; `most`: how many may be."""

    P_nx: npt.NDArray[np.float32]
    valid: npt.NDArray[np.int64]
    eligible: npt.NDArray[np.bool_]
    exact: npt.NDArray[np.int64]
    is_landmark: npt.NDArray[np.bool_]
    P_et: npt.NDArray[np.float64]
    left_out_et: npt.NDArray[np.float64]
    tried: int
    most: int


def next_round(
    context: StageContext, known: Known, folder: Path
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What is to be reported of this round, and the next samples whose gradients are computed: their tokens as an artifact, cut
    into shards; None after the last round. `folder`: for scratch files.

    With `size: auto` it ends once `min_captured` is promised, and never later than at the cap; else at the size.
    """
    refine = context.job.parameters["refine"]
    is_auto, most = is_capped(refine), known.most
    unknown = known.eligible.copy()
    unknown[known.exact] = False
    left = min(most - known.tried, int(unknown.sum()))
    if not known.tried and left <= 0:
        return None, None
    promised = _promise(context, known, unknown, folder) if is_auto or left <= 0 else None
    stopped = None
    if not unknown.any():
        stopped = "pool"
    elif is_auto and promised is not None and promised >= refine["min_captured"]:
        stopped = "promised"
    elif left <= 0:
        stopped = "max_cost" if is_auto else "size"
    found = {
        "refined": known.tried,
        "times_budget": round(known.tried / context.job.budget, 2),
        "most": most,
        "promise": promised,
        "stopped": stopped,
    }
    if stopped is not None:
        return found, None
    return found, _shortlist(context, known, unknown, min(left, math.ceil(most / refine["rounds"])))


def _promise(context: StageContext, known: Known, unknown: npt.NDArray[np.bool_], folder: Path) -> float | None:
    """None before as many samples are refined as are to be selected. The residuals are those of the landmarks, which unlike the
    shortlist are a random part of the pool."""
    refined = np.zeros(len(unknown), dtype=bool)
    refined[known.exact[~known.is_landmark]] = True
    if refined.sum() < context.job.budget:
        return None
    return promise(
        columns(known.P_nx, known.valid),
        Residuals.of(known.P_et[known.is_landmark], known.left_out_et[known.is_landmark]),
        refined=refined,
        unknown=unknown,
        budget=context.job.budget,
        by_turns=context.job.parameters["selection"] == "round_robin",
        seed=context.job.parameters["seed"],
        folder=folder,
    )


def _shortlist(context: StageContext, known: Known, unknown: npt.NDArray[np.bool_], size: int) -> dict[str, Any]:
    """The best by propagated influence of what is not exact: exact influence spreads wider than the propagated one, so it would
    fill the list. `predicted`: the mean influence of some of them, evenly spread, to be compared with the exact one."""
    parameters = context.job.parameters
    rows = shortlist(
        columns(known.P_nx, known.valid),
        mean_influence(known.P_nx, known.valid),
        size,
        by_turns=parameters["selection"] == "round_robin",
        seed=parameters["seed"],
        eligible=unknown,
    )
    tokens = token_files.rows_artifact(context.store, context.prepared["pool_tokens"], rows)
    lengths = token_files.read_counts(context.store, tokens).length
    compared = rows[:: -(-len(rows) * parameters["refine"]["rounds"] // _COMPARED)]
    predicted = mean_influence(known.P_nx[compared], known.valid)
    return {
        "tokens": tokens,
        "count": len(rows),
        "shards": gradient_shards(lengths),
        "predicted": {"index": compared.tolist(), "influence": predicted.astype(np.float32).tolist()},
    }


def columns(P_nx: npt.NDArray[np.float32], chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Those columns; a view, of a file that is mapped, where they are the first ones."""
    if np.array_equal(chosen, np.arange(len(chosen))):
        return P_nx[:, : len(chosen)]
    return P_nx[:, chosen]


def mean_influence(P_nx: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The mean over those targets, float64 (n,), a block of rows at a time."""
    starts = range(0, len(P_nx), KERNEL_ROWS)
    means = [columns(P_nx[start : start + KERNEL_ROWS], targets).mean(axis=1, dtype=np.float64) for start in starts]
    return np.concatenate(means)
