"""Seeded random projection of gradients to a few values that keep inner products (METHOD 3).

A layer's gradient G (O, I) becomes H = G P_in / sqrt(q), (O, q), with P_in applied to the inputs *before* the outer product, so
that the (O, I) matrix never exists; then each entry of H gets a random sign and is added to one of `dim` sums, taken in turn,
which all layers share. Signs are +1 and -1, exact in every dtype; inner products are unbiased. Why not a few directions on
either side, a block of values for each layer: the activations of all samples share large components, by which the errors
of the other side's few directions are multiplied, and a few layers hold most of a gradient (docs/decisions/0010-projection.md).

Shape suffixes: O output features, I input features, q directions of the input side, k values of a projected gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def seeded_generator(seed: int, *names: str) -> np.random.Generator:
    """A generator that depends on the seed and the names only: the same on every machine and device."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _signs(rows: int, columns: int, generator: np.random.Generator) -> Tensor:
    bits = np.unpackbits(np.frombuffer(generator.bytes(-(-rows * columns // 8)), dtype=np.uint8), count=rows * columns)
    return torch.from_numpy(bits.reshape(rows, columns).astype(np.float32) * 2 - 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerProjection:
    """What projects one layer: P_in (I, q), None where that side is not reduced; the signs (O, q) of the entries of H; and the
    place `first` of the k sums where the turn begins, so that small layers spread over all of them."""

    P_Iq: Tensor | None
    S_Oq: Tensor
    first: int
    dim: int

    def to(self, like: Tensor) -> LayerProjection:
        """The same projection in the dtype and on the device of a tensor."""
        P_Iq = None if self.P_Iq is None else self.P_Iq.to(like)
        return LayerProjection(P_Iq=P_Iq, S_Oq=self.S_Oq.to(like), first=self.first, dim=self.dim)

    def project_input(self, a_BTI: Tensor) -> Tensor:
        """Without the scale 1 / sqrt(q), which `fold` applies."""
        return a_BTI if self.P_Iq is None else a_BTI @ self.P_Iq

    def fold(self, H_BOq: Tensor) -> Tensor:
        """Outer products with projected inputs to the sums of their entries: (..., O, q) -> (..., k)."""
        flat = (H_BOq * self.S_Oq).flatten(-2)
        if self.P_Iq is not None:
            flat *= self.P_Iq.shape[1] ** -0.5
        whole = flat.shape[-1] // self.dim * self.dim
        sums: Tensor = flat[..., :whole].unflatten(-1, (-1, self.dim)).sum(dim=-2)
        sums[..., : flat.shape[-1] - whole] += flat[..., whole:]
        return sums.roll(self.first, -1)

    def apply(self, G_OI: Tensor) -> Tensor:
        """Project gradients that exist already: (..., O, I) -> (..., k)."""
        return self.fold(self.project_input(G_OI))


@dataclass(frozen=True, slots=True)
class GradientProjection:
    """Projection of all layers together to `dim` values, by `directions` on the input side of each at most (METHOD 3).

    The signs depend on these, the seed and the layer's name alone: the same on every worker and device. Raises ValueError
    where a number is below 1.
    """

    dim: int = 16_384
    seed: int = 0
    directions: int = 128

    def __post_init__(self) -> None:
        for name in ("dim", "directions"):
            if getattr(self, name) < 1:
                raise ValueError(f"projection {name} must be at least 1, not {getattr(self, name)}")

    def reduces(self, sizes: Iterable[tuple[int, int]]) -> bool:
        """Whether layers of those (O, I) have more than `dim` weights together: what has not is kept as it is."""
        return sum(out * into for out, into in sizes) > self.dim

    def layer(
        self,
        name: str,
        out_features: int,
        in_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LayerProjection:
        """The projection of the layer called `name`, in the given dtype and on the given device."""
        q, P_Iq = in_features, None
        if in_features > self.directions:
            q = self.directions
            P_Iq = _signs(in_features, q, seeded_generator(self.seed, name, "in")).to(device, dtype)
        generator = seeded_generator(self.seed, name, "out")
        first = int(generator.integers(self.dim))
        S_Oq = _signs(out_features, q, generator).to(device, dtype)
        return LayerProjection(P_Iq=P_Iq, S_Oq=S_Oq, first=first, dim=self.dim)
