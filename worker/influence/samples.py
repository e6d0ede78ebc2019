"""Ragged tokenised samples, and how they are cut into batches.

Samples stay flat arrays: ten million rows as Python objects take hours to plan, as arrays seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Tokenised samples, one after the other.

    Sample i is `input_ids[offsets[i]:offsets[i + 1]]`. `response` marks the tokens whose cross-entropy counts. A token is
    predicted from the ones before it, so a marked token at position 0 of a sample has no prediction and does not count.

    input_ids: int32 (N,).  response: bool (N,).  offsets: int64 (n + 1,), from 0 to N, not decreasing.
    Raises ValueError where shapes, dtypes or offsets do not fit together.
    """

    input_ids: npt.NDArray[np.int32]
    response: BoolArray
    offsets: IntArray

    def __post_init__(self) -> None:
        for name, dtype in (("input_ids", np.int32), ("response", np.bool_), ("offsets", np.int64)):
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype != dtype:
                expected = np.dtype(dtype).name
                raise ValueError(f"{name} must be a flat {expected} array, not {array.dtype} of shape {array.shape}")
        if self.input_ids.shape != self.response.shape:
            raise ValueError(f"input_ids has {self.input_ids.size} tokens but response has {self.response.size}")
        steps = np.diff(self.offsets)
        if (
            not self.offsets.size
            or self.offsets[0] != 0
            or self.offsets[-1] != self.input_ids.size
            or (steps < 0).any()
        ):
            raise ValueError(f"offsets must rise from 0 to the number of tokens, {self.input_ids.size}")

    def __len__(self) -> int:
        return int(self.offsets.size - 1)

    @property
    def lengths(self) -> IntArray:
        """Tokens per sample, int64 (n,)."""
        return np.subtract(self.offsets[1:], self.offsets[:-1])

    def slice(self, start: int, stop: int) -> Samples:
        """Samples start to stop (exclusive), without copying the tokens."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"slice {start}:{stop} is outside of the {len(self)} samples")
        first, last = self.offsets[start], self.offsets[stop]
        return Samples(
            input_ids=self.input_ids[first:last],
            response=self.response[first:last],
            offsets=self.offsets[start : stop + 1] - first,
        )

    def take(self, indices: npt.ArrayLike) -> Samples:
        """The samples at `indices` (n',), in that order; an index may occur more than once."""
        chosen = np.asarray(indices, dtype=np.int64)
        if chosen.ndim != 1 or ((chosen < 0) | (chosen >= len(self))).any():
            raise ValueError(f"indices must be a flat array of numbers from 0 to {len(self) - 1}")
        lengths = self.lengths[chosen]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        source = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Samples(input_ids=self.input_ids[source], response=self.response[source], offsets=offsets)

    def predictable(self) -> BoolArray:
        """The response tokens that have a token before them, bool (N,)."""
        counted = self.response.copy()
        counted[self.offsets[:-1][self.lengths > 0]] = False
        return counted

    def predicted(self) -> IntArray:
        """Number of predicted response tokens per sample, int64 (n,)."""
        return count_per_sample(self.predictable(), self.offsets)


def count_per_sample(marked: BoolArray, offsets: IntArray) -> IntArray:
    """Number of True in each sample: bool (N,), int64 (n + 1,) -> int64 (n,)."""
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(marked, dtype=np.int64)])
    counts: IntArray = total[offsets[1:]] - total[offsets[:-1]]
    return counts


def last_marked(marked: BoolArray, offsets: IntArray) -> IntArray:
    """Position within its sample of the last True, -1 where there is none: bool (N,), int64 (n + 1,) -> int64 (n,)."""
    position = np.where(marked, np.arange(marked.size), -1)
    latest = np.concatenate([np.full(1, -1), np.maximum.accumulate(position)])[offsets[1:]]
    return np.where(latest >= offsets[:-1], latest - offsets[:-1], -1).astype(np.int64)


def token_batches(lengths: npt.ArrayLike, token_budget: int) -> list[IntArray]:
    """Cut samples into batches that hold at most `token_budget` tokens once padded.

    Samples are sorted by length, the longest first (so that a batch which does not fit in memory shows at once), equal
    lengths in order of index. In each batch max length x count <= token_budget; a longer sample is a batch alone.

    lengths: (n,) -> list of int64 index arrays that hold each of 0..n-1 once.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, not {token_budget}")
    order = np.argsort(-sizes, kind="stable").astype(np.int64)
    batches: list[IntArray] = []
    start = 0
    while start < order.size:
        longest = max(int(sizes[order[start]]), 1)
        count = max(token_budget // longest, 1)
        batches.append(order[start : start + count])
        start += count
    return batches
