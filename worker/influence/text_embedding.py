"""Embeddings from a sample's tokens alone: no model, no forward pass (METHOD 10, `text`; docs/decisions/0020-text-embedding.md).

A row is the parts of `PARTS` one after the other, each scaled so that the mean squared distance of two samples in it is its
weight: a kernel of the distance needs nothing else. The scales are those of some samples of the pool, the same for all its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .projection import seeded_generator
from .samples import BoolArray, IntArray, Samples

FloatArray = npt.NDArray[np.float64]

DIRECTIONS = 256
"""Columns of a side: every token is a seeded random direction of as many signs, so that a sum of them counts tokens."""

_TABLE = 1 << 22
"""Entries of the table in which a block of samples looks up its tokens: as many samples as have room for all tokens each."""


def _signs(tokens: IntArray, seed: int) -> Tensor:
    """The direction of each token, -1 or 1, float32 (m, q): a function of the token and the seed alone."""
    count = int(tokens.max(initial=-1)) + 1
    drawn = seeded_generator(seed, "text embedding").bytes(count * DIRECTIONS // 8)
    bits = np.frombuffer(drawn, np.uint8).reshape(count, DIRECTIONS // 8)[tokens]
    return torch.from_numpy(np.unpackbits(bits, axis=1)).float().mul_(2).sub_(1)


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """The reply or the prompt of n samples: of its tokens the numbers and the samples, int64 (N,); where each sample's begin,
    int64 (n + 1,); and the direction of each number, float32 (m, q)."""

    places: IntArray
    rows: IntArray
    offsets: IntArray
    signs_mq: Tensor

    @classmethod
    def of(cls, places: IntArray, marked: BoolArray, samples: Samples, signs_mq: Tensor) -> _Side:
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(marked, dtype=np.int64)])
        offsets = before[samples.offsets]
        return cls(places[marked], np.repeat(np.arange(len(samples)), np.diff(offsets)), offsets, signs_mq)

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.offsets)

    def sums(self, values: npt.NDArray[np.generic]) -> FloatArray:
        """Of a value for each token the sum over each sample, float64 (n,)."""
        summed: FloatArray = np.bincount(self.rows, weights=values, minlength=self.offsets.size - 1).astype(np.float64)
        return summed


def _direction(side: _Side) -> Tensor:
    """The sum of the directions of each sample's tokens, of unit length, float32 (n, q); 0 where there are none."""
    sums_nq = nn.functional.embedding_bag(
        torch.from_numpy(side.places),
        side.signs_mq,
        torch.from_numpy(side.offsets),
        mode="sum",
        include_last_offset=True,
    )
    return nn.functional.normalize(sums_nq, dim=1)


def _scalars(reply: _Side, prompt: _Side) -> Tensor:
    """The logarithms of both lengths; of the reply's tokens the shares that stand in the prompt and that are distinct, float32
    (n, 4). 0 where there is nothing to divide by."""
    counted = np.maximum(reply.lengths, 1)
    shared, distinct = _shared_and_distinct(reply, prompt)
    columns = [np.log1p(reply.lengths), np.log1p(prompt.lengths), shared / counted, distinct / counted]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def _shared_and_distinct(reply: _Side, prompt: _Side) -> tuple[FloatArray, FloatArray]:
    """Of each sample the tokens of the reply that are in the prompt too, and those that are its last of their kind, (n,) each.

    Without sorting: a block of samples has a table of the tokens for each, into which a token writes its number. Numbers rise
    from block to block, so what the table held before is never mistaken, and of equal tokens the last one's stays.
    """
    count, size = reply.offsets.size - 1, len(reply.signs_mq)
    step = max(1, _TABLE // max(size, 1))
    table = np.zeros(min(step, count) * size, np.int32)
    reply_keys, prompt_keys = (side.rows % step * size + side.places for side in (reply, prompt))
    is_shared, is_last = np.zeros(reply.places.size, bool), np.zeros(reply.places.size, bool)
    number = 1
    for start in range(0, count, step):
        stop = min(start + step, count)
        ours = slice(*reply.offsets[[start, stop]].tolist())
        table[prompt_keys[slice(*prompt.offsets[[start, stop]].tolist())]] = number
        keys = reply_keys[ours]
        is_shared[ours] = table[keys] == number
        numbers = np.arange(number + 1, number + 1 + keys.size, dtype=np.int32)
        table[keys] = numbers
        is_last[ours] = table[keys] == numbers
        number += 1 + keys.size
    return reply.sums(is_shared), reply.sums(is_last)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a row: how it is made, (n, w), how much it weighs, and whether its columns are of different units."""

    weight: float
    of: Callable[[_Side, _Side], Tensor]
    is_standardised: bool = False


PARTS: Mapping[str, Part] = {
    "reply": Part(1.0, lambda reply, _: _direction(reply)),
    "prompt": Part(1.0, lambda _, prompt: _direction(prompt)),
    "scalars": Part(2.0, _scalars, is_standardised=True),
}

HIDDEN, HIDDEN_WEIGHT = "hidden", 1.0
"""A model's hidden state may stand beside the parts, scaled like them."""


def text_parts(samples: Samples, seed: int) -> dict[str, Tensor]:
    """Every part of the samples before it is scaled, float32 (n, w). A sample without tokens is 0."""
    tokens, places = np.unique(samples.input_ids, return_inverse=True)
    signs_mq = _signs(tokens.astype(np.int64), seed)
    reply, prompt = (_Side.of(places, marked, samples, signs_mq) for marked in (samples.response, ~samples.response))
    return {name: part.of(reply, prompt) for name, part in PARTS.items()}


@dataclass(frozen=True, slots=True, eq=False)
class PartScale:
    """What a part is scaled with: (values - centre) * scale, float32 (w,) each."""

    centre: Tensor
    scale: Tensor

    @classmethod
    def of(cls, values_lw: Tensor, weight: float, *, is_standardised: bool = False) -> PartScale:
        """So that the mean squared distance between two of the rows (l, w) becomes the weight; with a standard deviation of 1
        for every column before, where they are standardised. What does not vary becomes 0."""
        values_lw = values_lw.double()
        variance_w = values_lw.var(dim=0, correction=1 if len(values_lw) > 1 else 0)
        scale_w = torch.ones_like(variance_w)
        if is_standardised:
            scale_w = torch.where(variance_w > 1e-12, variance_w, torch.inf).rsqrt()
        distance = 2 * float((variance_w * scale_w.square()).sum())  # the mean over pairs that are not the same row
        scale_w *= (weight / distance) ** 0.5 if distance > 1e-12 else 0.0
        return cls(values_lw.mean(dim=0).float(), scale_w.float())

    def apply(self, values_nw: Tensor) -> Tensor:
        # That the mean is taken away changes no distance, but what float16 rounds.
        return (values_nw - self.centre) * self.scale


@dataclass(frozen=True, slots=True, eq=False)
class TextScales:
    """What all rows of a pool are scaled with: the parts by name, and `HIDDEN` where that stands beside them."""

    seed: int
    scales: Mapping[str, PartScale]

    @classmethod
    def of(cls, scaled_on: Samples, seed: int, hidden_lD: Tensor | None = None) -> TextScales:
        """Those of these samples, with directions by the seed; and of those hidden states, of which rows that are not finite do
        not count."""
        values = text_parts(scaled_on, seed)
        scales = {
            name: PartScale.of(values[name], part.weight, is_standardised=part.is_standardised)
            for name, part in PARTS.items()
        }
        if hidden_lD is not None:
            scales[HIDDEN] = PartScale.of(hidden_lD[torch.isfinite(hidden_lD).all(dim=1)], HIDDEN_WEIGHT)
        return cls(seed, scales)


def text_embeddings(samples: Samples, scales: TextScales, hidden_nD: Tensor | None = None) -> Tensor:
    """Embeddings float32 (n, e) on the CPU, finite also of a sample without prompt, reply or token; a row depends on its own
    sample only. e is twice `DIRECTIONS`, and the scalars; and D where the samples' hidden states, of unit length, stand beside
    them.
    """
    parts = text_parts(samples, scales.seed)
    if hidden_nD is not None:
        parts[HIDDEN] = hidden_nD.float()
    return torch.cat([scales.scales[name].apply(values) for name, values in parts.items()], dim=1)


def plain_text_parts(one: Samples, seed: int) -> dict[str, Tensor]:
    """`text_parts` of one sample, float64 (w,), with lists and sets."""
    tokens = one.input_ids.tolist()
    reply = [token for token, is_reply in zip(tokens, one.response, strict=True) if is_reply]
    prompt = [token for token, is_reply in zip(tokens, one.response, strict=True) if not is_reply]

    def unit(side: list[int]) -> Tensor:
        if not side:
            return torch.zeros(DIRECTIONS, dtype=torch.float64)
        sum_q = torch.stack([_signs(np.array([token]), seed)[0].double() for token in side]).sum(dim=0)
        return nn.functional.normalize(sum_q, dim=0)

    shared = sum(token in prompt for token in reply)
    count = max(len(reply), 1)
    scalars = [np.log(1 + len(reply)), np.log(1 + len(prompt)), shared / count, len(set(reply)) / count]
    return {"reply": unit(reply), "prompt": unit(prompt), "scalars": torch.tensor(scalars, dtype=torch.float64)}
