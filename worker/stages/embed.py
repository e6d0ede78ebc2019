"""Embed: the cheap embeddings of a shard of the pool, of the landmarks (candidates) or of the target (rds_plus)."""

from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save_file

from service.plan import operations
from worker.influence import EmbeddingOptions, embed
from worker.loading.model_shape import counts_of, shape_of
from worker.stages.context import StageContext
from worker.stages.exact_rows import check_nonfinite
from worker.text import token_files


def run(context: StageContext, artifact_key: str, spec: dict[str, Any], *, dataset: str) -> dict[str, Any]:
    """Writes `embeddings`, float16 (m, e), rows of unit length: half the room, and a rounding far below the kernel's width.

    The rows of samples whose embedding is not finite are 0; the result names them.

    Raises:
        DataError: more than 1 % of the stage's samples are not finite; names them.
    """
    chosen = spec["options"]
    samples = token_files.read_tokens(context.store, spec["tokens"], spec["start"], spec["stop"])
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
        rows = token_files.read_indices(context.store, spec["tokens"])[spec["start"] : spec["stop"]]
        wrong = rows[broken.numpy()].tolist()
        check_nonfinite(context, dataset, wrong, spec["of"], "samples")
        embeddings[broken] = 0
    with context.store.writing(artifact_key) as path:
        save_file({"embeddings": embeddings.to(torch.float16)}, path)
    return {
        "tokens": int(samples.input_ids.size),
        "operations": operations.embedding(shape_of(model), counts_of(samples), asdict(options)),
        "width": embeddings.shape[1],
        "nonfinite": wrong,
    }
