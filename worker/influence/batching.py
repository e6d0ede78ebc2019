"""Padded batches on the device, and the loop that runs them and halves the token budget when memory runs out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .samples import IntArray, Samples, token_batches

Progress = Callable[[int, int], None]
"""Called after each batch with (samples done, samples in all); what it raises stops the computation."""


def default_token_budget(device: torch.device) -> int:
    """Tokens of a padded batch where the caller names none.

    On a processor few, so that activations tend to stay in its cache (docs/decisions/0002-core-speed.md), on an accelerator
    enough to fill it.
    """
    return 512 if device.type == "cpu" else 16384


def padded(samples: Samples, indices: IntArray, lengths: IntArray, device: torch.device) -> Tensor:
    """First `lengths[i]` tokens of each sample i, padded on the right with token 0: int64 (B, T).

    With causal attention nothing before the padding sees it, so no attention mask is needed.
    """
    used = lengths[indices]
    ids_BT = np.zeros((indices.size, int(used.max())), dtype=np.int64)
    for row, (start, count) in enumerate(zip(samples.offsets[indices], used, strict=True)):
        ids_BT[row, :count] = samples.input_ids[start : start + count]
    return torch.from_numpy(ids_BT).to(device)


def marked_positions(marked: np.ndarray, samples: Samples, indices: IntArray) -> tuple[IntArray, IntArray]:
    """Rows (in the batch) and positions (in the sample) of the marked tokens of each sample: two int64 (R,)."""
    places = [np.flatnonzero(marked[samples.offsets[i] : samples.offsets[i + 1]]) for i in indices]
    rows = np.repeat(np.arange(indices.size), [place.size for place in places])
    return rows.astype(np.int64), np.concatenate(places).astype(np.int64)


def run_batches(
    lengths: IntArray,
    token_budget: int,
    run: Callable[[IntArray], None],
    progress: Progress | None = None,
    restart: Callable[[], None] | None = None,
) -> None:
    """Call `run` with the indices of each token batch of samples of length `lengths` (n,), each sample once.

    Where the device runs out of memory, the budget is halved for that batch and all that follow, down to one sample. A `run`
    that adds to a sum may then have added part of the failed batch: `restart` must clear the sum, and all samples are run
    again. The longest samples come first, so that it is nearly always the first batch that fails.
    Raises torch.OutOfMemoryError, saying what to lower, where a single sample does not fit.
    """
    pending = token_batches(lengths, token_budget)[::-1]
    done = 0
    while pending:
        batch = pending.pop()
        try:
            run(batch)
            exhausted = False
        except torch.OutOfMemoryError as error:
            if batch.size == 1:
                raise torch.OutOfMemoryError(
                    f"a single sample of {lengths[batch[0]]} tokens does not fit in device memory: lower the maximum "
                    "sample length, the projection dimension, or the number of tangents or directions, or load the "
                    "model in bfloat16"
                ) from error
            exhausted = True
        if exhausted:  # outside of the handler, where the traceback no longer keeps the failed batch's tensors alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            budget = max(int(lengths[batch].max()) * batch.size // 2, 1)
            left = np.concatenate([batch, *pending[::-1]])
            if restart is not None:
                restart()
                left, done = np.arange(len(lengths)), 0
            pending = [left[part] for part in token_batches(lengths[left], budget)][::-1]
            continue
        done += batch.size
        if progress is not None:
            progress(done, len(lengths))
