"""Select: from the influence on each target to the selection and its weights."""

from typing import Any

import numpy as np
from safetensors.numpy import save_file

from worker import data
from worker.influence import first_order_weights, mean_one_over_selected, round_robin, top_k
from worker.stages.context import StageContext


def run(context: StageContext, artifact_key: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Writes `influence` float32 (n,), `weight` float32 (n,), `exact` bool (n,), `selected` int64 (budget,) in rank order."""
    parameters, budget = context.job.parameters, context.job.budget
    eligible = data.read_counts(context.store, spec["tokens"]).predicted > 0
    exact = np.zeros(len(eligible), dtype=bool)
    exact[data.read_indices(context.store, spec["landmarks"])] = True
    with context.store.local(spec["influence"]) as path:
        P_nt = np.load(path, mmap_mode="r")
        # A target sample without a response has no influence on it at all; it takes no turn and no part in the mean.
        speaks = P_nt[exact].any(axis=0)
        if speaks.any() and not speaks.all():
            P_nt = P_nt[:, speaks]
        influence = P_nt.mean(axis=1, dtype=np.float64)
        if parameters["selection"] == "round_robin":
            selected = round_robin(P_nt, budget, seed=parameters["seed"], eligible=eligible)
        else:
            selected = top_k(influence, budget, eligible=eligible)
    weight = np.zeros(len(eligible))
    weight[selected] = 1.0
    solution: dict[str, Any] = {}
    if parameters["selection"] == "weighted":
        solved = first_order_weights(influence[eligible], budget)
        weight[eligible] = mean_one_over_selected(solved.weights)
        solution = {"lambda": solved.ridge, "tau": solved.threshold}
    tensors = {
        "influence": influence.astype(np.float32),
        "weight": weight.astype(np.float32),
        "exact": exact,
        "selected": selected.astype(np.int64),
    }
    with context.store.writing(artifact_key) as path:
        save_file(tensors, path)
    context.report(len(eligible))
    return solution
