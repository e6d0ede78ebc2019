"""Embed: the cheap embeddings of a shard of the pool, of the landmarks (candidates) or of the target (rds_plus)."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from service.plan import operations
from worker.influence import EmbeddingOptions, Samples, TextScales, embed, text_embeddings
from worker.loading.model_shape import counts_of, shape_of
from worker.stages.context import StageContext
from worker.stages.exact_rows import check_nonfinite
from worker.text import token_files

_STATES_SCALED_ON = 64


def run(context: StageContext, artifact_key: str, spec: dict[str, Any], *, dataset: str) -> dict[str, Any]:
    """Writes `embeddings`, float16 (m, e): half the room, and a rounding far below the kernel's width. Rows have unit length,
    those from text the scale that the samples `scaled_on` give them; `text` needs no model.

    The rows of samples whose embedding is not finite are 0; the result names them.

    Raises:
        DataError: more than 1 % of the stage's samples are not finite; names them.
    """
    samples = token_files.read_tokens(context.store, spec["tokens"], spec["start"], spec["stop"])
    options, kind = spec["options"], spec["options"]["kind"]
    passes = 0.0
    if kind == "text":
        embeddings = text_embeddings(samples, TextScales.of(_scaled_on(context, spec), context.job.parameters["seed"]))
        context.report(len(samples))
    elif kind == "text_hidden":
        embeddings, passes = _beside_states(context, spec, samples)
    else:
        embeddings, passes = _states(context, spec["checkpoint"], samples, options, context.report)
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


def _scaled_on(context: StageContext, spec: Mapping[str, Any]) -> Samples:
    return token_files.read_all(context.store, spec["scaled_on"])


def _beside_states(context: StageContext, spec: Mapping[str, Any], samples: Samples) -> tuple[Tensor, float]:
    """The text beside the state after the first blocks, (m, e), and the operations of the model, which is also run on a few
    samples for the scale of all states."""
    options = {**spec["options"], "kind": "hidden", "pooling": "response"}
    scaled_on = _scaled_on(context, spec)
    few = scaled_on.slice(0, min(_STATES_SCALED_ON, len(scaled_on)))
    scale_states, scale_passes = _states(context, spec["checkpoint"], few, options, lambda _: None)
    states, passes = _states(context, spec["checkpoint"], samples, options, context.report)
    scales = TextScales.of(scaled_on, context.job.parameters["seed"], scale_states)
    return text_embeddings(samples, scales, states), passes + scale_passes


def _states(
    context: StageContext,
    checkpoint: str | None,
    samples: Samples,
    chosen: Mapping[str, Any],
    report: Callable[[int], None],
) -> tuple[Tensor, float]:
    """What the model says of the samples, (m, D), and the operations of it."""
    options = EmbeddingOptions(
        kind=chosen["kind"],
        pooling=chosen["pooling"],
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
        progress=lambda done, _: report(done),
    )
    return states, operations.embedding(shape_of(model), counts_of(samples), asdict(options))
