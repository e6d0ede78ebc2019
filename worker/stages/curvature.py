"""Curvature: directions in which the target loss bends, how it bends there, and what the optimiser's offset adds (METHOD 1)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from service.plan.limits import LANDMARKS_PER_DIRECTION
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
from worker.stages.exact_rows import Measure, Rows, exact_rows, gradient_rows, split_targets, valid_targets
from worker.text import token_files


def run(context: StageContext, artifact_key: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Writes for `ggn` and `hessian` directions `V` (r, k), `M` (c, r, r) and, where the optimiser has an offset b, `Hb` (c, k):
    first of the mean loss of all valid targets, then, where some are held out, of the others alone (c = 2). For `fisher` it
    writes `Gb` (t,), each valid target's gradient along b. float32, M float64.

    Directions are of the landmarks of highest mean influence, since weight goes to such samples.
    """
    parameters = context.job.parameters
    model = context.model(spec["checkpoint"])
    valid = valid_targets(context, spec["target_gradients"])
    targets = token_files.read_all(context.store, spec["targets"])
    options, state = optimizer.options(parameters), optimizer.state(context, spec["state"])
    offset = step_offset(model, spec["modules"], options, state)
    facts: dict[str, Any] = {}
    if parameters["curvature"]["type"] == "fisher":
        Gb_t = torch.zeros(context.prepared["t"])
        Gb_t[torch.from_numpy(valid)] = _along(context, model, targets.take(valid), offset, spec["modules"])
        tensors = {"Gb": Gb_t}
    else:
        scaling = None
        if options.is_adam:
            scaling = gradient_scaling(model, spec["modules"], options, state, parameters["optimizer"]["scaling"])
        samples, G_mk = _landmarks(context, spec, valid)
        coefficients, V_rk = low_rank(G_mk, parameters["curvature"]["rank"], seed=parameters["seed"])
        dim = parameters["gradient"]["projection_dim"]
        # All targets' curvature is that of both halves together: one half's own costs one pass over the landmarks more.
        halves = [rows for rows in split_targets(context, valid) if len(rows)]
        terms = second_order_terms(
            model,
            samples,
            [targets.take(rows) for rows in halves],
            kind=parameters["curvature"]["type"],
            coefficients=coefficients,
            scaling=scaling,
            offset=offset,
            projection=None if dim is None else GradientProjection(dim=dim, seed=parameters["seed"]),
            modules=spec["modules"],
            token_budget=context.token_budget,
            progress=lambda done, of: context.report(done * len(valid) // of),
        )
        shares = [len(rows) / len(valid) for rows in halves]

        def all_and_held_in(values: list[torch.Tensor]) -> torch.Tensor:
            whole = torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(dim=0)
            return torch.stack([whole, *values[:-1]])

        tensors = {"V": V_rk.float(), "M": all_and_held_in([each.M_rr for each in terms])}
        if offset is not None:
            tensors["Hb"] = all_and_held_in([each.Hb_k for each in terms if each.Hb_k is not None]).float()
        facts = {"rank": len(V_rk), "asymmetry": max(each.asymmetry for each in terms)}
    with context.store.writing(artifact_key) as path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return facts


def _along(
    context: StageContext, model: Any, targets: Samples, offset: Mapping[str, torch.Tensor] | None, modules: str
) -> torch.Tensor:
    if offset is None:
        return torch.zeros(len(targets))
    found = directional_derivatives(
        model,
        targets,
        {name: b_OI[None] for name, b_OI in offset.items()},
        modules=modules,
        token_budget=context.token_budget,
        progress=lambda done, _: context.report(done),
    )
    return found[:, 0].float()


def _landmarks(context: StageContext, spec: dict[str, Any], valid: Rows) -> tuple[Samples, torch.Tensor]:
    """The landmarks that make the directions: their tokens, and their gradients (m, k)."""
    rounds = spec["landmarks"]
    rows, P_lt = exact_rows(context.store, Measure.load(context, {**spec, "curvature": None}), rounds)
    influence = P_lt[:, torch.from_numpy(valid)].mean(dim=1).numpy()
    count = LANDMARKS_PER_DIRECTION * context.job.parameters["curvature"]["rank"]
    best = np.sort(rows[np.argsort(-influence, kind="stable")[:count]])
    return token_files.read_rows(context.store, rounds[0]["tokens"], best), gradient_rows(context.store, rounds, best)
