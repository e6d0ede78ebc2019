"""Seeded factored random projection of per-layer gradients (METHOD 3).

A layer's gradient G (O, I) becomes P_outT G P_in (p, q). The factors are applied to the output gradients and to the inputs
*before* the outer product, so that the (O, I) matrix never exists. Entries are +1 and -1, exact in every dtype,
and the scale 1/sqrt(p q) is applied to the result; inner products are then unbiased.

Shape suffixes: O output features, I input features, p and q their projected sizes.
"""

from __future__ import annotations

import hashlib
import math
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
    """The two factors of one layer, P_out (O, p) and P_in (I, q), and the scale of the projected gradient.

    A factor is None where its side is not reduced; that side is then kept exactly.
    """

    P_Op: Tensor | None
    P_Iq: Tensor | None
    scale: float

    def to(self, like: Tensor) -> LayerProjection:
        """The same factors in the dtype and on the device of a tensor."""
        P_Op, P_Iq = (None if factor is None else factor.to(like) for factor in (self.P_Op, self.P_Iq))
        return LayerProjection(P_Op=P_Op, P_Iq=P_Iq, scale=self.scale)

    def project_output(self, delta_BTO: Tensor) -> Tensor:
        return delta_BTO if self.P_Op is None else delta_BTO @ self.P_Op

    def project_input(self, a_BTI: Tensor) -> Tensor:
        return a_BTI if self.P_Iq is None else a_BTI @ self.P_Iq

    def apply(self, G_OI: Tensor) -> Tensor:
        """Project gradients that exist already: (..., O, I) -> (..., p, q)."""
        G_Oq = self.project_input(G_OI)
        return self.project_output(G_Oq.mT).mT * self.scale


@dataclass(frozen=True, slots=True)
class FactoredProjection:
    """Projection of all layers together to at most `dim` values (METHOD 3).

    Each of L layers gets floor(sqrt(dim / L)) directions on either side, at most its own size. The matrices depend on
    (seed, layer name) alone: the same on every worker and device, independent of the other layers.
    """

    dim: int = 8192
    seed: int = 0

    def size(self, layers: int, out_features: int, in_features: int) -> tuple[int, int]:
        """Projected (p, q) of a layer of an (O, I) weight, one of `layers`. Raises ValueError where dim is too small."""
        side = math.isqrt(self.dim // layers)
        if side < 1:
            raise ValueError(f"projection dim {self.dim} is less than one value for each of {layers} layers: raise it")
        return min(side, out_features), min(side, in_features)

    def layer(
        self,
        name: str,
        layers: int,
        out_features: int,
        in_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LayerProjection:
        """The factors of the layer called `name`, in the given dtype and on the given device."""
        p, q = self.size(layers, out_features, in_features)
        generator_out = seeded_generator(self.seed, name, "out")
        generator_in = seeded_generator(self.seed, name, "in")
        P_Op = None if p == out_features else _signs(out_features, p, generator_out).to(device, dtype)
        P_Iq = None if q == in_features else _signs(in_features, q, generator_in).to(device, dtype)
        scale = (1.0 if P_Op is None else p**-0.5) * (1.0 if P_Iq is None else q**-0.5)
        return LayerProjection(P_Op=P_Op, P_Iq=P_Iq, scale=scale)
