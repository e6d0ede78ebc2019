"""Exact per-sample gradients of the mean response cross-entropy, their weighted sums and their products (METHOD 1 and 3).

For a linear layer with input a and output gradient delta the gradient of sample b is sum_t delta_bt a_btT. Where it is projected
the factors are applied to delta and a, and the (O, I) matrix never exists; the other uses form it for as many samples at a time
as `PIECE_BYTES` holds.

Shape suffixes: n samples, k values a gradient, c directions or weightings, B samples of a batch, b of a piece, T tokens,
O and I layer output and input, q projected inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .backward import Use, over_samples
from .batching import Progress
from .models import accumulation_dtype, layer_size, linear_layers, parameter_device, parameter_dtype
from .optimizers import Scaling
from .projection import GradientProjection, LayerProjection
from .samples import Samples

PIECE_BYTES = 128 * 2**20
"""Gradients in full are formed for as many samples at a time as this holds, at least one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradients:
    """Per-sample gradients and losses, on the CPU, in the order of the samples.

    values: (n, k), float32 (float64 from a float64 model); unprojected, layer after layer, each (O, I) row by row.
    loss: (n,), mean cross-entropy in nats of each sample's predicted response tokens, 0 where it has none.
    nonfinite: int64 indices of the samples whose gradient or loss is not finite.
    """

    values: Tensor
    loss: Tensor
    nonfinite: Tensor


def per_sample_gradients(
    model: Any,
    samples: Samples,
    *,
    modules: str = "down_proj",
    projection: GradientProjection | None,
    scaling: Scaling | None = None,
    token_budget: int | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> Gradients:
    """Gradients of each sample's loss with respect to the chosen weights, (n, k) (METHOD 3).

    The loss is the mean cross-entropy of the sample's predicted response tokens. Dropout is off whatever the model's mode. A
    result depends on its own sample only, beyond rounding: not on batch, padding or order. Samples without a predicted
    token have gradient 0 and loss 0. `modules` is as in `linear_layers`; `projection=None` keeps all O x I values of each layer.
    `scaling` multiplies the gradients by a before they are projected; where it is exact each layer's inputs are kept in full for
    the length of a batch, and the gradient is formed in full, `PIECE_BYTES` at a time. `device` moves the model there first;
    None leaves it. `token_budget` bounds the padded tokens of a batch; None is a default for the device. `progress` is called
    after each batch.

    Raises ValueError for unknown modules, samples that do not fit the model, a scaling of other modules, and families with an
    unknown output head; torch.OutOfMemoryError where one sample alone does not fit.
    """
    if device is not None:
        model.to(device)
    layers = linear_layers(model, modules)
    if scaling is not None:
        scaling.check(layers)
    use = _PerSample(model, layers, projection, scaling, len(samples))
    loss_n = over_samples(model, samples, layers, use, token_budget=token_budget, progress=progress)
    finite_n = torch.isfinite(use.values_nk).all(dim=1) & torch.isfinite(loss_n)
    return Gradients(values=use.values_nk, loss=loss_n, nonfinite=torch.nonzero(~finite_n).flatten())


def weighted_gradients(
    model: Any,
    samples: Samples,
    weights_nc: Tensor | npt.NDArray[np.float64],
    *,
    modules: str = "down_proj",
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Sums over the samples of w_ic g_i by layer, (c, O, I), in one pass (METHOD 1, Curvature).

    g_i is the whole gradient of sample i's loss, as in `per_sample_gradients`. float32 (float64 from a float64 model), each on
    its layer's device: the result holds c x d values for the d weights of the chosen layers, so the caller bounds c. Samples
    whose weights are all 0 are not run. Raises ValueError as `per_sample_gradients` does, for weights of another shape or not
    finite, and where a sample's gradient is not finite, naming the samples.
    """
    weights = torch.as_tensor(weights_nc, device="cpu")
    if weights.ndim != 2 or weights.shape[0] != len(samples) or not torch.isfinite(weights).all():
        raise ValueError(f"weights_nc must be finite and ({len(samples)}, c), not of shape {tuple(weights.shape)}")
    layers = linear_layers(model, modules)
    use = _WeightedSums(model, layers, weights)
    skip_n = (weights == 0).all(dim=1).numpy()
    loss_n = over_samples(
        model, samples, layers, use, skip_n=skip_n, token_budget=token_budget, progress=progress, restart=use.clear
    )
    wrong = torch.nonzero(~(use.finite_n.cpu() & torch.isfinite(loss_n))).flatten().tolist()
    if wrong:
        listed = ", ".join(map(str, wrong[:20]))
        raise ValueError(f"samples without a finite gradient: {listed} ({len(wrong)} in all); give them weight 0")
    return use.sums


def directional_derivatives(
    model: Any,
    samples: Samples,
    directions: Mapping[str, Tensor],
    *,
    modules: str = "down_proj",
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Products g_i . v_c of each sample's whole gradient with directions, (n, c) on the CPU, in one pass.

    directions: (c, O, I) by layer name, of every chosen layer; copied to the layer's device in float32 (float64 for a float64
    model). Samples without a predicted token have 0; the row of a sample whose gradient is not finite is not finite. Raises
    ValueError as `per_sample_gradients` does, and for directions that do not fit the layers.
    """
    layers = linear_layers(model, modules)
    use = _Products(model, layers, directions, len(samples))
    over_samples(model, samples, layers, use, token_budget=token_budget, progress=progress)
    return use.values_nc


def sample_losses(
    model: Any, samples: Samples, *, token_budget: int | None = None, progress: Progress | None = None
) -> Tensor:
    """Mean cross-entropy in nats of each sample's predicted response tokens, (n,) on the CPU: forward passes alone.

    float32 (float64 from a float64 model); 0 for a sample without a predicted token. Raises as `per_sample_gradients` does.
    """
    return over_samples(model, samples, {}, None, token_budget=token_budget, progress=progress)


def _in_pieces(delta_BTO: Tensor, a_BTI: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Gradients in full, (b, O, I), of a few samples at a time, summed over tokens in `dtype`; the slice says which."""
    size = delta_BTO.shape[-1] * a_BTI.shape[-1] * dtype.itemsize
    step = max(PIECE_BYTES // size, 1)
    for start in range(0, delta_BTO.shape[0], step):
        part = slice(start, start + step)
        yield part, torch.bmm(delta_BTO[part].to(dtype).mT, a_BTI[part].to(delta_BTO.device, dtype))


class _Side:
    """What one side of a layer's gradient is multiplied with before the outer product: projection, factor of a, both or none.

    It follows the tensors it meets: a layer of an adapter may compute in another dtype than the model, or on another device.
    """

    def __init__(self, projection: Tensor | None, factor: Tensor | None) -> None:
        self.matrix = projection
        self.vector = factor if projection is None else None
        if projection is not None and factor is not None:
            self.matrix = projection.to(factor) * factor[:, None]

    def apply(self, x: Tensor) -> Tensor:
        if self.matrix is not None:
            self.matrix = self.matrix.to(x)  # copies at the first batch only
            return x @ self.matrix
        return x if self.vector is None else x * self.vector.to(x)


class _PerSample(Use):
    """Use: the (scaled, projected) gradient of each sample."""

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, nn.Module],
        projection: GradientProjection | None,
        scaling: Scaling | None,
        count: int,
    ) -> None:
        self.dtype, self.device = accumulation_dtype(parameter_dtype(model)), parameter_device(model)
        self.exact = scaling if scaling is not None and scaling.full else None
        self.projections: dict[str, LayerProjection] = {}
        self.sides: dict[str, tuple[_Side, _Side]] = {}
        self.columns: dict[str, slice] = {}
        sizes = {name: layer_size(module) for name, module in layers.items()}
        is_reduced = projection is not None and projection.reduces(sizes.values())
        start = 0
        for name, (out_features, in_features) in sizes.items():
            P_Iq = None
            if projection is not None and is_reduced:
                self.projections[name] = projection.layer(name, out_features, in_features, dtype=self.dtype)
                P_Iq, self.columns[name] = self.projections[name].P_Iq, slice(0, projection.dim)
            else:
                self.columns[name] = slice(start, start + out_features * in_features)
                start += out_features * in_features
            row, column = scaling.factors[name] if scaling is not None and scaling.factors else (None, None)
            self.sides[name] = _Side(None, row), _Side(P_Iq, column)
        k = projection.dim if projection is not None and is_reduced else start
        self.values_nk = torch.zeros(count, k, dtype=self.dtype)

    def start(self, samples_B: Tensor) -> None:
        self.batch_Bk = torch.zeros(len(samples_B), self.values_nk.shape[1], dtype=self.dtype, device=self.device)

    def keep(self, layer: str, a_BTI: Tensor) -> Tensor:
        return a_BTI if self.exact is not None else self.sides[layer][1].apply(a_BTI).to(self.dtype)

    def take(self, layer: str, kept_BTq: Tensor, delta_BTO: Tensor) -> None:
        columns = self.columns[layer]
        for part, G_bOq in _in_pieces(self.sides[layer][0].apply(delta_BTO), kept_BTq, self.dtype):
            if self.exact is not None:  # nothing was projected on the way: q is I
                G_bOq *= self.exact.full[layer].to(G_bOq)
            if layer in self.projections:
                found = self.projections[layer] = self.projections[layer].to(G_bOq)  # copies at the first batch only
                values_bk = found.fold(G_bOq if self.exact is None else found.project_input(G_bOq))
            else:
                values_bk = G_bOq.flatten(1)
            self.batch_Bk[part, columns] += values_bk.to(self.device)

    def finish(self, samples_B: Tensor) -> None:
        self.values_nk[samples_B] = self.batch_Bk.cpu()
        del self.batch_Bk


class _WeightedSums(Use):
    """Use: the sums over samples, and which samples are not finite."""

    def __init__(self, model: Any, layers: Mapping[str, nn.Module], weights_nc: Tensor) -> None:
        self.dtype = accumulation_dtype(parameter_dtype(model))
        self.weights_nc = weights_nc.to(self.dtype)
        self.sums = {name: self._zeros(module) for name, module in layers.items()}
        self.finite_n = torch.ones(len(weights_nc), dtype=torch.bool, device=parameter_device(model))

    def _zeros(self, module: nn.Module) -> Tensor:
        device = next(module.parameters()).device
        return torch.zeros(self.weights_nc.shape[1], *layer_size(module), dtype=self.dtype, device=device)

    def clear(self) -> None:
        for sum_cOI in self.sums.values():
            sum_cOI.zero_()

    def start(self, samples_B: Tensor) -> None:
        self.samples_B, self.weights_Bc = samples_B.to(self.finite_n.device), self.weights_nc[samples_B]

    def take(self, layer: str, kept_BTq: Tensor, delta_BTO: Tensor) -> None:
        for x in (kept_BTq, delta_BTO):  # a sum is finite where all its terms are
            finite_B = torch.isfinite(x.sum(dim=(1, 2), dtype=self.dtype))
            self.finite_n[self.samples_B] &= finite_B.to(self.finite_n.device)
        weights_Bc = self.weights_Bc.to(delta_BTO.device)
        sum_cOI = self.sums[layer]
        if sum_cOI.shape[0] == 1:  # tokens of all samples at once: no gradient of a single one is formed
            delta_NO = (delta_BTO.to(self.dtype) * weights_Bc[:, :, None]).flatten(0, 1)
            sum_cOI[0].addmm_(delta_NO.T, kept_BTq.to(delta_NO).flatten(0, 1))
            return
        for part, G_bOI in _in_pieces(delta_BTO, kept_BTq, self.dtype):
            sum_cOI.flatten(1).addmm_(weights_Bc[part].T, G_bOI.flatten(1))


class _Products(Use):
    """Use: the inner products of each sample's gradient with directions."""

    def __init__(
        self, model: Any, layers: Mapping[str, nn.Module], directions: Mapping[str, Tensor], count: int
    ) -> None:
        self.dtype, self.device = accumulation_dtype(parameter_dtype(model)), parameter_device(model)
        self.directions: dict[str, Tensor] = {}
        columns = {len(direction) for direction in directions.values()}
        for name, module in layers.items():
            if name not in directions:
                raise ValueError(f"directions has no layer {name}: it must have every layer of the chosen modules")
            shape, size = tuple(directions[name].shape), layer_size(module)
            if len(columns) != 1 or shape[1:] != size:
                raise ValueError(
                    f"directions of layer {name} must be (c, {size[0]}, {size[1]}), the same c for all, not {shape}"
                )
            self.directions[name] = directions[name].to(next(module.parameters()).device, self.dtype).flatten(1)
        self.values_nc = torch.zeros(count, columns.pop(), dtype=self.dtype)

    def start(self, samples_B: Tensor) -> None:
        self.batch_Bc = torch.zeros(len(samples_B), self.values_nc.shape[1], dtype=self.dtype, device=self.device)

    def take(self, layer: str, kept_BTq: Tensor, delta_BTO: Tensor) -> None:
        for part, G_bOI in _in_pieces(delta_BTO, kept_BTq, self.dtype):
            self.batch_Bc[part] += (G_bOI.flatten(1) @ self.directions[layer].T).to(self.device)

    def finish(self, samples_B: Tensor) -> None:
        self.values_nc[samples_B] = self.batch_Bc.cpu()
