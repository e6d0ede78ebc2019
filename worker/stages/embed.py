"""Embed: the cheap embeddings of a shard of the pool, of the landmarks (candidates) or of the target (rds_plus)."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.plan import operations
from worker.influence import EmbeddingOptions, Samples, TextStatistics, embed, text_embeddings
from worker.loading.model_shape import counts_of, shape_of
from worker.stages.context import StageContext
from worker.stages.exact_rows import check_nonfinite
from worker.text import token_files


def run(context: StageContext, artifact_key: str, spec: dict[str, Any], *, dataset: str) -> dict[str, Any]:
    """Writes `embeddings`, float16 (m, e): half the room, and a rounding far below the kernel's width. Rows have unit length,
    those from text the scale that the pool's `statistics` give them; `text` needs no model.

    The rows of samples whose embedding is not finite are 0; the result names them.

    Raises:
        DataError: more than 1 % of the stage's samples are not finite; names them.
    """
    samples = token_files.read_tokens(context.store, spec["tokens"], spec["start"], spec["stop"])
    options, kind = spec["options"], spec["options"]["kind"]
    passes = 0.0
    if kind == "text":
        embeddings = text_embeddings(samples, _statistics(context, spec))
        context.report(len(samples))
    elif kind == "text_hidden":
        hidden = {**options, "kind": "hidden", "pooling": "response"}
        states, passes = _states(context, spec["checkpoint"], samples, hidden)
        embeddings = text_embeddings(samples, _statistics(context, spec), states)
    else:
        embeddings, passes = _states(context, spec["checkpoint"], samples, options)
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
        "operations": passes,
        "width": embeddings.shape[1],
        "nonfinite": wrong,
    }


def _states(
    context: StageContext, checkpoint: str | None, samples: Samples, chosen: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """What the model says of the samples, (m, D), and the operations of it."""
    options = EmbeddingOptions(
        kind=chosen["kind"],
        pooling=chosen["pooling"] or "response",
        blocks=chosen["blocks"],
        tangents=chosen["tangents"],
        seed=context.job.parameters["seed"],
    )
    model = context.model(checkpoint)
    states = embed(
        model,
        samples,
        options=options,
        token_budget=context.token_budget,
        progress=lambda done, _: context.report(done),
    )
    return states, operations.embedding(shape_of(model), counts_of(samples), asdict(options))


def _statistics(context: StageContext, spec: Mapping[str, Any]) -> TextStatistics:
    with context.store.local(spec["statistics"]) as path:
        return TextStatistics.of_tensors(load_file(path))
