"""Seeded random projection of gradients to a few values that keep inner products (METHOD 3).

A layer's gradient G (O, I) becomes G R / √q, (O, q), with R (I, q) applied to the inputs *before* the outer product, so that the
(O, I) matrix never exists; then each entry gets a random sign and is added to one of `dim` sums, in rotation, which all layers
share. Signs are +1 and -1, exact in every dtype; inner products are unbiased. Why not a few directions on either side, a block
of values for each layer: the activations of all samples share large components, by which the errors of the other side's few
directions are multiplied, and a few layers hold most of a gradient (docs/decisions/0010-projection.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
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
    """What projects one layer: R (I, q), None where that side is not reduced; the signs (O, q) of what is added up; and `first`,
    which of the `dim` sums gets the first entry, so that small layers spread over all of them."""

    R_Iq: Tensor | None
    S_Oq: Tensor
    first: int
    dim: int

    def to(self, like: Tensor) -> LayerProjection:
        """The same projection in the dtype and on the device of a tensor."""
        R_Iq = None if self.R_Iq is None else self.R_Iq.to(like)
        return LayerProjection(R_Iq=R_Iq, S_Oq=self.S_Oq.to(like), first=self.first, dim=self.dim)

    def project_input(self, a_mI: Tensor) -> Tensor:
        """(..., I) -> (..., q), without the scale 1 / √q, which `fold` applies."""
        return a_mI if self.R_Iq is None else a_mI @ self.R_Iq

    def fold(self, G_mOq: Tensor) -> Tensor:
        """Gradients with projected inputs to the sums of their entries: (..., O, q) -> (..., k)."""
        flat = (G_mOq * self.S_Oq).flatten(-2)
        if self.R_Iq is not None:
            flat *= self.R_Iq.shape[1] ** -0.5
        whole = flat.shape[-1] // self.dim * self.dim
        sums: Tensor = flat[..., :whole].unflatten(-1, (-1, self.dim)).sum(dim=-2)
        sums[..., : flat.shape[-1] - whole] += flat[..., whole:]
        return sums.roll(self.first, -1)

    def apply(self, G_mOI: Tensor) -> Tensor:
        """Project gradients that exist already: (..., O, I) -> (..., k)."""
        return self.fold(self.project_input(G_mOI))


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
        q, R_Iq = in_features, None
        if in_features > self.directions:
            q = self.directions
            R_Iq = _signs(in_features, q, seeded_generator(self.seed, name, "in")).to(device, dtype)
        generator = seeded_generator(self.seed, name, "out")
        first = int(generator.integers(self.dim))
        S_Oq = _signs(out_features, q, generator).to(device, dtype)
        return LayerProjection(R_Iq=R_Iq, S_Oq=S_Oq, first=first, dim=self.dim)


def plain_projection(layers: Mapping[str, Tensor], projection: GradientProjection | None) -> Tensor:
    """One sample's gradients (O, I) by layer name, (k,) as `per_sample_gradients` keeps them: each entry goes to its sum."""
    if projection is None or sum(G_OI.numel() for G_OI in layers.values()) <= projection.dim:
        return torch.cat([G_OI.flatten() for G_OI in layers.values()])
    sums_k = next(iter(layers.values())).new_zeros(projection.dim)
    for name, G_OI in layers.items():
        made = projection.layer(name, *G_OI.shape, dtype=G_OI.dtype, device=G_OI.device)
        G_Oq = G_OI if made.R_Iq is None else G_OI @ made.R_Iq / made.R_Iq.shape[1] ** 0.5
        place = (made.first + torch.arange(G_Oq.numel(), device=G_OI.device)) % projection.dim
        sums_k.index_add_(0, place, (G_Oq * made.S_Oq).flatten())
    return sums_k
