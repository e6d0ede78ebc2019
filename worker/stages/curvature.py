"""Curvature: directions in which the target loss bends, how it bends there, and what the optimiser's drift adds (METHOD 1)."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from worker import data
from worker.influence import (
    GradientProjection,
    Samples,
    directional_derivatives,
    gradient_scaling,
    low_rank,
    second_order_terms,
    step_offset,
)
from worker.stages import optimizer
from worker.stages.context import StageContext
from worker.stages.influence import Measure, exact_rows, gradient_rows, speaking_targets

_LANDMARKS_A_DIRECTION = 8  # directions are sums of the gradients of this many times their number of landmarks


def run(context: StageContext, artifact_key: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Writes for `ggn` and `hessian` `directions` (r, k), `M` (r, r) and, where the optimiser drifts, `Hb` (k,); for `fisher`
    `target_drift` (t,), each target's gradient along the drift. float32, M float64. Targets without a response or a finite
    gradient have no part in it.

    Directions are of the landmarks of highest mean influence, since weight goes to such samples.
    """
    parameters = context.job.parameters
    model = context.model(spec["checkpoint"])
    speaking = speaking_targets(context, spec["target_gradients"])
    targets = data.read_all(context.store, spec["targets"]).take(speaking)
    options, state = optimizer.options(parameters), optimizer.state(context, spec["state"])
    facts: dict[str, Any]
    drift = step_offset(model, spec["modules"], options, state)
    if parameters["curvature"]["type"] == "fisher":
        along = torch.zeros(context.prepared["t"])
        along[torch.from_numpy(speaking)] = _along(context, model, targets, drift, spec["modules"])
        tensors = {"target_drift": along}
        facts = {}
    else:
        scaling = None
        if options.is_adam:
            scaling = gradient_scaling(model, spec["modules"], options, state, parameters["optimizer"]["scaling"])
        samples, G_mk = _landmarks(context, spec, speaking)
        coefficients, directions = low_rank(G_mk, parameters["curvature"]["rank"], seed=parameters["seed"])
        dim = parameters["gradient"]["projection_dim"]
        found = second_order_terms(
            model,
            samples,
            targets,
            kind=parameters["curvature"]["type"],
            coefficients=coefficients,
            scaling=scaling,
            offset=drift,
            projection=None if dim is None else GradientProjection(dim=dim, seed=parameters["seed"]),
            modules=spec["modules"],
            token_budget=context.token_budget,
            progress=lambda done, of: context.report(done * len(targets) // of),
        )
        tensors = {"directions": directions.float(), "M": found.M_rr}
        if found.Hb_k is not None:
            tensors["Hb"] = found.Hb_k.float()
        facts = {"rank": len(found.M_rr), "asymmetry": found.asymmetry}
    with context.store.writing(artifact_key) as path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return facts


def _along(
    context: StageContext, model: Any, targets: Samples, drift: dict[str, torch.Tensor] | None, modules: str
) -> torch.Tensor:
    if drift is None:
        return torch.zeros(len(targets))
    directions = {name: b_OI[None] for name, b_OI in drift.items()}
    found = directional_derivatives(
        model,
        targets,
        directions,
        modules=modules,
        token_budget=context.token_budget,
        progress=lambda done, _: context.report(done),
    )
    return found[:, 0].float()


def _landmarks(
    context: StageContext, spec: dict[str, Any], speaking: npt.NDArray[np.int64]
) -> tuple[Samples, torch.Tensor]:
    """The landmarks that make the directions: their tokens, and their gradients (m, k)."""
    rounds = spec["landmarks"]
    rows, P_lt = exact_rows(context.store, Measure.load(context, {**spec, "curvature": None}), rounds)
    influence = P_lt[:, torch.from_numpy(speaking)].mean(dim=1).numpy()
    count = _LANDMARKS_A_DIRECTION * context.job.parameters["curvature"]["rank"]
    best = np.sort(rows[np.argsort(-influence, kind="stable")[:count]])
    return data.read_rows(context.store, rounds[0]["tokens"], best), gradient_rows(context.store, rounds, best)
