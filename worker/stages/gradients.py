"""Gradients: the exact, projected per-sample gradients of a shard of the landmarks or of the target."""

from typing import Any

from safetensors.torch import save_file

from worker import data
from worker.errors import DataError
from worker.influence import FactoredProjection, per_sample_gradients
from worker.stages.context import StageContext


def run(context: StageContext, artifact_key: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Writes `gradients`, float32 (m, k), and `loss`, float32 (m,).

    Raises:
        DataError: a gradient is not finite; names the samples.
    """
    parameters = context.job.parameters
    samples = data.read_tokens(context.store, spec["tokens"], spec["start"], spec["stop"])
    gradients = per_sample_gradients(
        context.model(),
        samples,
        projection=FactoredProjection(dim=parameters["gradient"]["projection_dim"], seed=parameters["seed"]),
        token_budget=context.token_budget,
        progress=lambda done, _: context.report(done),
    )
    if len(gradients.nonfinite):
        rows = data.read_indices(context.store, spec["tokens"])[spec["start"] : spec["stop"]]
        named = ", ".join(str(rows[i]) for i in gradients.nonfinite[:10].tolist())
        raise DataError(
            f"{len(gradients.nonfinite)} samples have a loss or gradient that is not finite (rows {named});"
            " remove them, or compute with dtype float32."
        )
    with context.store.writing(artifact_key) as path:
        save_file({"gradients": gradients.values.contiguous(), "loss": gradients.loss.contiguous()}, path)
    return {"tokens": int(samples.input_ids.size), "mean_loss": float(gradients.loss.mean())}
