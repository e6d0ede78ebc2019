"""How a stage's samples are cut into shards. A shard is what a crash costs, and what one worker takes at a time: small, but not
so many that the ledger shows."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PREPARE_SHARD_BYTES = 2 * 2**20  # of rows as they are stored: some seconds of tokenising
EMBED_SHARD_TOKENS = 32_768
GRADIENT_SHARD_TOKENS = 8_192
MAX_SHARDS = 256


def shards(tokens: npt.NDArray[np.int64], shard_tokens: int) -> list[tuple[int, int]]:
    """Cuts samples (tokens of each, (n,)) into runs [start, stop) of about equal tokens, none without any where there are some.
    Depends on nothing else, so that every job and any number of workers meet the same shards."""
    ends = np.cumsum(tokens)
    total = int(tokens.sum())
    count = max(1, min(MAX_SHARDS, -(-total // shard_tokens), len(tokens)))
    cuts = np.searchsorted(ends, total * np.arange(1, count) / count, side="left") + 1
    inner = np.unique(np.clip(cuts, 1, len(tokens) - 1)) if count > 1 else cuts
    before, kept = 0, [0]
    for cut, done in zip(inner.tolist(), ends[inner - 1].tolist(), strict=True):
        if before < done < total:
            kept.append(cut)
            before = done
    return list(itertools.pairwise([*kept, len(tokens)]))


def prepare_shards(rows: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Cuts a dataset by the rows and bytes of its row groups; all rows of a group count as equally long."""
    each = np.maximum(np.array(sizes, np.int64) // np.array(rows, np.int64), 1)
    return shards(np.repeat(each, rows), PREPARE_SHARD_BYTES)


def embed_shards(tokens: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    return shards(tokens, EMBED_SHARD_TOKENS)


def gradient_shards(tokens: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    return shards(tokens, GRADIENT_SHARD_TOKENS)
