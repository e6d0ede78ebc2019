"""A model and samples as the plan counts with them."""

from typing import Any

import numpy as np

from service.models.shapes import shape_in
from service.plan.operations import Shape, Size, TokenCounts
from worker.influence import Samples
from worker.influence.causal_lm import block_list, linear_size
from worker.loading.folders import ModelFolder


def shape_in_files(folder: ModelFolder) -> Shape | str:
    """The sizes by its configuration, before any weights are loaded; or why they are unknown."""
    return shape_in(folder.path, None if folder.base is None else shape_in_files(folder.base))


def shape_of(model: Any) -> Shape:
    """The sizes of a causal language model, with the adapters that it has; those of its first block stand for all."""
    config, blocks = model.config.get_text_config(), block_list(model.base_model)[1]
    layers: dict[str, Size] = {}
    adapters, rank = set(), 0
    for name, module in blocks[0].named_modules():
        layer, _, adapter = name.partition(".lora_")
        if (size := linear_size(module)) is None:
            continue
        if not adapter:
            layers[layer.removesuffix(".base_layer")] = size
        elif adapter.startswith("A"):
            adapters.add(layer)
            rank = size[0]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        hidden=config.hidden_size,
        blocks=len(blocks),
        vocabulary=model.get_output_embeddings().weight.shape[0],
        attention_width=head * config.num_attention_heads,
        layers=layers,
        rank=rank,
        adapters=frozenset(adapters),
    )


def counts_of(samples: Samples) -> TokenCounts:
    lengths = samples.lengths.astype(np.float64)
    predicted = float(samples.predicted().sum())
    return TokenCounts(float((lengths > 0).sum()), float(lengths.sum()), float(np.square(lengths).sum()), predicted)
