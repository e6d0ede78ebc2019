"""Embed: the cheap embeddings of a shard of the pool, of the landmarks (candidates) or of the target (rds_plus)."""

from typing import Any

import torch
from safetensors.torch import save_file

from worker import data
from worker.influence import EmbeddingOptions, embed, embedding_flops
from worker.stages.context import StageContext
from worker.stages.influence import check_nonfinite


def run(context: StageContext, artifact_key: str, spec: dict[str, Any], *, dataset: str) -> dict[str, Any]:
    """Writes `embeddings`, float16 (m, e), rows of unit length: half the room, and a rounding far below the kernel's width.

    The rows of samples whose embedding is not finite are 0; the result names them.

    Raises:
        DataError: more than 1 % of the stage's samples are not finite; names them.
    """
    chosen = spec["options"]
    samples = data.read_tokens(context.store, spec["tokens"], spec["start"], spec["stop"])
    options = EmbeddingOptions(
        kind=chosen["kind"],
        pooling=chosen["pooling"] or "response",
        blocks=chosen["blocks"],
        tangents=chosen["tangents"],
        seed=context.job.parameters["seed"],
    )
    model = context.model(spec["checkpoint"])
    embeddings = embed(
        model,
        samples,
        options=options,
        token_budget=context.token_budget,
        progress=lambda done, _: context.report(done),
    )
    broken = ~torch.isfinite(embeddings).all(dim=1)
    wrong: list[int] = []
    if broken.any():
        rows = data.read_indices(context.store, spec["tokens"])[spec["start"] : spec["stop"]]
        wrong = rows[broken.numpy()].tolist()
        check_nonfinite(context, dataset, wrong, spec["of"], "samples")
        embeddings[broken] = 0
    with context.store.writing(artifact_key) as path:
        save_file({"embeddings": embeddings.to(torch.float16)}, path)
    return {
        "tokens": int(samples.input_ids.size),
        "operations": embedding_flops(model, samples, options=options).total,
        "width": embeddings.shape[1],
        "nonfinite": wrong,
    }
