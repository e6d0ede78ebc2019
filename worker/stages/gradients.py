"""Gradients: the exact, projected per-sample gradients of a shard of landmarks, of the shortlist or of the target."""

from typing import Any

import torch
from safetensors.torch import save_file

from service.plan import operations
from worker.influence import GradientProjection, gradient_scaling, per_sample_gradients
from worker.loading.model_shape import counts_of, shape_of
from worker.stages import optimizer
from worker.stages.context import StageContext
from worker.stages.exact_rows import check_nonfinite
from worker.text import token_files


def run(context: StageContext, artifact_key: str, spec: dict[str, Any], *, dataset: str) -> dict[str, Any]:
    """Writes `gradients`, float32 (m, k), scaled by the optimiser where the spec names a state, and `loss`, float32 (m,).

    The rows of samples whose loss or gradient is not finite are 0; the result names them by their rows in the dataset.

    Raises:
        DataError: more than 1 % of the stage's samples are not finite; names them.
    """
    parameters = context.job.parameters
    dim = parameters["gradient"]["projection_dim"]
    projection = None if dim is None else GradientProjection(dim=dim, seed=parameters["seed"])
    samples = token_files.read_tokens(context.store, spec["tokens"], spec["start"], spec["stop"])
    model = context.model(spec["checkpoint"])
    scaling = None
    if spec["state"] is not None:
        state, kind = optimizer.state(context, spec["state"]), parameters["optimizer"]["scaling"]
        scaling = gradient_scaling(model, spec["modules"], optimizer.options(parameters), state, kind)
    gradients = per_sample_gradients(
        model,
        samples,
        modules=spec["modules"],
        projection=projection,
        scaling=scaling,
        token_budget=context.token_budget,
        progress=lambda done, _: context.report(done),
    )
    rows = token_files.read_indices(context.store, spec["tokens"])[spec["start"] : spec["stop"]]
    wrong = rows[gradients.nonfinite.numpy()].tolist()
    check_nonfinite(context, dataset, wrong, spec["of"], "samples")
    gradients.values[gradients.nonfinite] = 0
    gradients.loss[gradients.nonfinite] = 0
    with context.store.writing(artifact_key) as path:
        save_file(
            {"gradients": gradients.values.float().contiguous(), "loss": gradients.loss.float().contiguous()}, path
        )
    return {
        "rows": len(samples),
        "tokens": int(samples.input_ids.size),
        "operations": operations.gradients(
            shape_of(model),
            counts_of(samples),
            modules=spec["modules"],
            projection_dim=dim,
            is_scaled_exactly=scaling is not None and parameters["optimizer"]["scaling"] == "exact",
        ),
        "mean_loss": float(gradients.loss[torch.from_numpy(samples.predicted() > 0)].mean()),
        "scaling_error": None if scaling is None else scaling.relative_error,
        "nonfinite": wrong,
        "width": int(gradients.values.shape[1]),
    }
