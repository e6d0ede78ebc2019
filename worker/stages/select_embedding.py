"""Choose the embedding: the cheapest whose leave-one-out fidelity on the landmarks is close to the best (METHOD 4)."""

from typing import Any

import numpy as np
import torch

from worker.influence import select_embedding
from worker.stages.context import StageContext
from worker.stages.exact_rows import Measure, exact_rows, valid_targets
from worker.stages.propagate import landmark_embeddings
from worker.text import token_files


def run(context: StageContext, spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of the chosen embedding, and the table of all candidates; writes no other artifact."""
    landmarks, P_lt = exact_rows(context.store, Measure.load(context, spec), spec["landmarks"])
    valid = valid_targets(context, spec["target_gradients"])
    compared = token_files.read_indices(context.store, spec["tokens"])
    known = np.isin(landmarks, compared)  # those that are not finite have embeddings, but no influence
    rows = np.searchsorted(compared, landmarks[known])
    embeddings = [landmark_embeddings(context.store, c["embeddings"], rows) for c in spec["candidates"]]
    kernel = context.job.parameters["kernel"]
    index, table = select_embedding(
        embeddings,
        P_lt[torch.from_numpy(known)][:, torch.from_numpy(valid)],
        options=[candidate["options"] for candidate in spec["candidates"]],
        costs=context.prepared["candidate_costs"],
        kernel=kernel["kind"],
        ridge=kernel["ridge"],
        bandwidth=kernel["bandwidth"],
    )
    context.report(len(landmarks))
    return {"chosen": spec["candidates"][index]["options"], "candidates": table}
