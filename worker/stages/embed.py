"""Embed: the cheap embeddings of a shard of the pool."""

from typing import Any

import torch
from safetensors.torch import save_file

from worker import data
from worker.influence import EmbeddingOptions, embed
from worker.stages.context import StageContext


def run(context: StageContext, artifact_key: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Writes `embeddings`, float16 (m, e), rows of unit length: half the room, and a rounding far below the kernel's width."""
    options = context.job.parameters["embedding"]
    samples = data.read_tokens(context.store, spec["tokens"], spec["start"], spec["stop"])
    embeddings = embed(
        context.model(),
        samples,
        options=EmbeddingOptions(
            kind=options["kind"],
            pooling=options["pooling"],
            blocks=options["blocks"],
            tangents=options["tangents"],
            seed=context.job.parameters["seed"],
        ),
        token_budget=context.token_budget,
        progress=lambda done, _: context.report(done),
    )
    with context.store.writing(artifact_key) as path:
        save_file({"embeddings": embeddings.to(torch.float16)}, path)
    return {"tokens": int(samples.input_ids.size), "width": embeddings.shape[1]}
