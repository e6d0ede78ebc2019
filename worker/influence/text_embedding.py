"""Embeddings from a sample's tokens alone: no forward pass (METHOD 10, `text`; docs/decisions/0020-text-embedding.md).

A row is the parts of `PARTS` one after the other, each scaled so that the mean squared distance of two samples in it is its
weight: a kernel of the distance needs nothing else. What samples are measured against are the statistics of their pool: its
tokens, how often each occurs, and the means and scales of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .errors import UnusableInput
from .projection import seeded_generator
from .samples import BoolArray, IntArray, Samples

FloatArray = npt.NDArray[np.float64]

MAX_DIRECTIONS = 256
"""Columns that the model's input embeddings are projected to, where it has more."""

_TABLE = 1 << 22
"""Entries of the table in which a block of samples looks up its tokens: as many samples as have room for a vocabulary each."""


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The tokens that a pool has.

    tokens: their ids, rising, int64 (V,).  surprisal: -log of each one's share of the pool's tokens, float64 (V,).
    W_Vq: the model's input embedding of each, projected, float32 (V, q), with a mean square of 1.
    """

    tokens: IntArray
    surprisal: FloatArray
    W_Vq: Tensor

    @classmethod
    def of(cls, counts: IntArray, blocks: Iterable[Tensor], *, seed: int) -> Vocabulary:
        """Of a pool that has token i `counts[i]` times, int64 (i,), and a model whose input embeddings are the `blocks` (b, D),
        one after the other, of which one is held at a time. `seed` is that of the projection.

        Raises UnusableInput where the model has no embedding of a token, or one that is not finite.
        """
        tokens = np.flatnonzero(counts)
        surprisal = np.log(max(int(counts.sum()), 1)) - np.log(counts[tokens])
        return cls(tokens, surprisal, _projected(tokens, blocks, seed))

    def places(self, input_ids: npt.NDArray[np.int32]) -> IntArray:
        """The place of each token among `tokens`, int64 (N,).

        Raises ValueError where one is none of them.
        """
        table = np.full(int(self.tokens.max(initial=-1)) + 2, -1, np.int64)
        table[self.tokens] = np.arange(self.tokens.size)
        places: IntArray = table[np.minimum(input_ids, table.size - 1)]
        if (places < 0).any():
            raise ValueError(
                f"token {int(input_ids[places < 0][0])} is none of the {self.tokens.size} that were counted"
            )
        return places


def with_tokens_of(samples: Samples, counts: IntArray) -> IntArray:
    """How often each token occurs, int64 (i,), with those of the samples; longer where there are larger ids."""
    size = max(counts.size, int(samples.input_ids.max(initial=-1)) + 1)
    found: IntArray = np.bincount(samples.input_ids, minlength=size)
    found[: counts.size] += counts
    return found


def _projected(tokens: IntArray, blocks: Iterable[Tensor], seed: int) -> Tensor:
    """Rows of the tokens, float32 (V, q), whose values float16 holds."""
    W_Vq, R_Dq, first = torch.zeros(tokens.size, 0), None, 0
    for block_bD in blocks:
        if R_Dq is None:
            R_Dq = _directions(block_bD.shape[1], seed)
            W_Vq = torch.zeros(tokens.size, R_Dq.shape[1])
        start, stop = np.searchsorted(tokens, [first, first + len(block_bD)]).tolist()
        W_Vq[start:stop] = block_bD[torch.from_numpy(tokens[start:stop] - first)].float() @ R_Dq
        first += len(block_bD)
    if tokens.size and tokens[-1] >= first:
        raise UnusableInput(f"the model has no embedding of token {int(tokens[-1])}: it has {first} of them")
    if not torch.isfinite(W_Vq).all():
        raise UnusableInput("the model's input embeddings are not finite")
    size = float(W_Vq.square().mean().sqrt())
    return (W_Vq / (size or 1.0)).half().float()


def _directions(width: int, seed: int) -> Tensor:
    """Gaussian projection (D, q); of a matrix that is no wider, the identity."""
    if width <= MAX_DIRECTIONS:
        return torch.eye(width)
    generator = seeded_generator(seed, "text embedding")
    return torch.from_numpy(generator.standard_normal((width, MAX_DIRECTIONS), dtype=np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """The reply or the prompt of n samples: of its tokens the places in the vocabulary and the samples, int64 (N,); and where
    each sample's begin, int64 (n + 1,)."""

    places: IntArray
    rows: IntArray
    offsets: IntArray

    @classmethod
    def of(cls, places: IntArray, marked: BoolArray, samples: Samples) -> _Side:
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(marked, dtype=np.int64)])
        offsets = before[samples.offsets]
        return cls(places[marked], np.repeat(np.arange(len(samples)), np.diff(offsets)), offsets)

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.offsets)

    def sums(self, values: npt.NDArray[np.generic]) -> FloatArray:
        """Of a value for each token the sum over each sample, float64 (n,)."""
        summed: FloatArray = np.bincount(self.rows, weights=values, minlength=self.offsets.size - 1).astype(np.float64)
        return summed


def _mean_row(side: _Side, vocabulary: Vocabulary) -> Tensor:
    """The mean embedding of each sample's tokens, of unit length, float32 (n, q); 0 where there are none."""
    sums_nq = nn.functional.embedding_bag(
        torch.from_numpy(side.places),
        vocabulary.W_Vq,
        torch.from_numpy(side.offsets),
        mode="sum",
        include_last_offset=True,
    )
    return nn.functional.normalize(sums_nq, dim=1)


def _scalars(reply: _Side, prompt: _Side, vocabulary: Vocabulary) -> Tensor:
    """Lengths and surprise, float32 (n, .); 0 where there is nothing to divide by."""
    counted = np.maximum(reply.lengths, 1)
    shared, distinct = _shared_and_distinct(reply, prompt, vocabulary.tokens.size)
    columns = [
        np.log1p(reply.lengths),
        np.log1p(prompt.lengths),
        np.log1p(reply.lengths + prompt.lengths),
        reply.sums(vocabulary.surprisal[reply.places]) / counted,
        shared / counted,
        distinct / counted,
    ]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def _shared_and_distinct(reply: _Side, prompt: _Side, size: int) -> tuple[FloatArray, FloatArray]:
    """Of each sample the tokens of the reply that are in the prompt too, and those that are its last of their kind, (n,) each.

    Without sorting: a block of samples has a table of the vocabulary for each, into which a token writes its number. Numbers rise
    from block to block, so what the table held before is never mistaken, and of equal tokens the last one's stays.
    """
    count = reply.offsets.size - 1
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
    of: Callable[[_Side, _Side, Vocabulary], Tensor]
    is_standardised: bool = False


PARTS: Mapping[str, Part] = {
    "reply": Part(1.0, lambda reply, _, vocabulary: _mean_row(reply, vocabulary)),
    "prompt": Part(1.0, lambda _, prompt, vocabulary: _mean_row(prompt, vocabulary)),
    "scalars": Part(2.0, _scalars, is_standardised=True),
}


HIDDEN, HIDDEN_WEIGHT = "hidden", 1.0
"""A model's hidden state may stand beside the parts, scaled like them."""


def text_parts(samples: Samples, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Every part of the samples before it is scaled, float32 (n, w). A sample without tokens is 0.

    Raises ValueError where a token is not in the vocabulary.
    """
    places = vocabulary.places(samples.input_ids)
    reply, prompt = (_Side.of(places, marked, samples) for marked in (samples.response, ~samples.response))
    return {name: part.of(reply, prompt, vocabulary) for name, part in PARTS.items()}


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
class TextStatistics:
    """All that a pool's samples are embedded with: the scales of `PARTS`, and of `HIDDEN` where that may stand beside them."""

    vocabulary: Vocabulary
    scales: Mapping[str, PartScale]

    @classmethod
    def of(cls, vocabulary: Vocabulary, scaled_on: Samples, hidden_lD: Tensor | None = None) -> TextStatistics:
        """With the means and scales that the parts of these samples have, and those hidden states, of which rows that are not
        finite do not count."""
        values = text_parts(scaled_on, vocabulary)
        scales = {
            name: PartScale.of(values[name], part.weight, is_standardised=part.is_standardised)
            for name, part in PARTS.items()
        }
        if hidden_lD is not None:
            scales[HIDDEN] = PartScale.of(hidden_lD[torch.isfinite(hidden_lD).all(dim=1)], HIDDEN_WEIGHT)
        return cls(vocabulary, scales)

    def tensors(self) -> dict[str, Tensor]:
        """As they are kept, by name: what `of_tensors` reads."""
        vocabulary = self.vocabulary
        kept = {
            "tokens": torch.from_numpy(vocabulary.tokens),
            "surprisal": torch.from_numpy(vocabulary.surprisal),
            "rows": vocabulary.W_Vq.half(),
        }
        for name, scale in self.scales.items():
            kept |= {f"{name}.centre": scale.centre, f"{name}.scale": scale.scale}
        return kept

    @classmethod
    def of_tensors(cls, kept: Mapping[str, Tensor]) -> TextStatistics:
        vocabulary = Vocabulary(kept["tokens"].numpy(), kept["surprisal"].numpy(), kept["rows"].float())
        names = [name.removesuffix(".centre") for name in kept if name.endswith(".centre")]
        return cls(vocabulary, {name: PartScale(kept[f"{name}.centre"], kept[f"{name}.scale"]) for name in names})


def text_embeddings(samples: Samples, statistics: TextStatistics, hidden_nD: Tensor | None = None) -> Tensor:
    """Embeddings float32 (n, e) on the CPU, finite also of a sample without prompt, reply or token; a row depends on its own
    sample only. e is twice q, and the scalars; and D where the samples' hidden states, of unit length, stand beside them.

    Raises ValueError where a token is not in the vocabulary.
    """
    parts = text_parts(samples, statistics.vocabulary)
    if hidden_nD is not None:
        parts[HIDDEN] = hidden_nD.float()
    return torch.cat([statistics.scales[name].apply(values) for name, values in parts.items()], dim=1)


def plain_text_parts(one: Samples, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """`text_parts` of one sample, float64 (w,), with lists and sets."""
    places = {int(token): place for place, token in enumerate(vocabulary.tokens)}
    tokens = [places[int(token)] for token in one.input_ids]
    reply = [token for token, is_reply in zip(tokens, one.response, strict=True) if is_reply]
    prompt = [token for token, is_reply in zip(tokens, one.response, strict=True) if not is_reply]

    def unit(side: list[int]) -> Tensor:
        if not side:
            return torch.zeros(vocabulary.W_Vq.shape[1], dtype=torch.float64)
        mean_q: Tensor = torch.stack([vocabulary.W_Vq[token].double() for token in side]).mean(dim=0)
        return mean_q.div(mean_q.norm())

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    scalars = [
        np.log(1 + len(reply)),
        np.log(1 + len(prompt)),
        np.log(1 + len(tokens)),
        mean([float(vocabulary.surprisal[token]) for token in reply]),
        mean([float(token in prompt) for token in reply]),
        len(set(reply)) / max(len(reply), 1),
    ]
    return {"reply": unit(reply), "prompt": unit(prompt), "scalars": torch.tensor(scalars, dtype=torch.float64)}
