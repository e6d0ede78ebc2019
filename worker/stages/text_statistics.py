"""Text statistics: what embeddings from text are measured against, one pass over the tokens of the pool (METHOD 10)."""

from typing import Any

import numpy as np
from safetensors.torch import save_file

from worker.influence import EmbeddingOptions, TextStatistics, Vocabulary, embed, with_tokens_of
from worker.loading.input_embeddings import input_embedding_blocks
from worker.stages.context import StageContext
from worker.text import token_files


def run(context: StageContext, artifact_key: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Writes the tensors of `TextStatistics`: counts and rows of all tokens of the pool `tokens`, means and scales of the samples
    `scaled_on`. Where `text_hidden` may be asked for, `hidden_blocks` says after how many blocks, and the scale of that state is
    among them; else no model is loaded. A warm-up does not change the input embeddings that are read: pools stay embedded.

    Raises:
        ModelError: the model's input embeddings cannot be read.
    """
    counts, rows = np.zeros(0, np.int64), 0
    for part in token_files.iter_tokens(context.store, spec["tokens"]):
        counts = with_tokens_of(part, counts)
        rows += len(part)
        context.report(rows)
    folder = context.models.used(context.job.model, context.prepared["model_fingerprint"])
    vocabulary = Vocabulary.of(counts, input_embedding_blocks(folder), seed=context.job.parameters["seed"])
    scaled_on = token_files.read_all(context.store, spec["scaled_on"])
    hidden = None
    if spec["hidden_blocks"] is not None:
        options = EmbeddingOptions(kind="hidden", pooling="response", blocks=spec["hidden_blocks"])
        hidden = embed(context.model(spec["checkpoint"]), scaled_on, options=options, token_budget=context.token_budget)
    statistics = TextStatistics.of(vocabulary, scaled_on, hidden)
    with context.store.writing(artifact_key) as path:
        save_file(statistics.tensors(), path)
    return {
        "tokens": int(counts.sum()),
        "vocabulary": int(vocabulary.tokens.size),
        "scaled_on": len(scaled_on),
        "columns": int(vocabulary.W_Vq.shape[1]),
    }
