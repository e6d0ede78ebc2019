"""Choose the embedding: the cheapest whose leave-one-out fidelity on the landmarks is close to the best (METHOD 4)."""

from typing import Any

import numpy as np
import torch

from worker import data
from worker.influence import choose
from worker.stages.context import StageContext
from worker.stages.influence import Measure, exact_rows, speaking_targets
from worker.stages.propagate import landmark_embeddings


def run(context: StageContext, spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of the chosen embedding, and the table of all candidates; writes no artifact of its own."""
    landmarks, P_lt = exact_rows(context.store, Measure.load(context, spec), spec["landmarks"])
    speaking = speaking_targets(context, spec["target_gradients"])
    compared = data.read_indices(context.store, spec["tokens"])
    known = np.isin(landmarks, compared)  # those that are not finite have embeddings, but no influence
    rows = np.searchsorted(compared, landmarks[known])
    embeddings = [landmark_embeddings(context.store, c["embeddings"], rows) for c in spec["candidates"]]
    kernel = context.job.parameters["kernel"]
    index, table = choose(
        embeddings,
        P_lt[torch.from_numpy(known)][:, torch.from_numpy(speaking)],
        options=[candidate["options"] for candidate in spec["candidates"]],
        costs=context.prepared["candidate_costs"],
        kernel=kernel["kind"],
        ridge=kernel["ridge"],
        bandwidth=kernel["bandwidth"],
    )
    context.report(len(landmarks))
    return {"chosen": spec["candidates"][index]["options"], "candidates": table}
