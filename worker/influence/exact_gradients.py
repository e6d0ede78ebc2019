"""Exact per-sample gradients of the mean response cross-entropy, their weighted sums and their products (METHOD 1 and 3).

For a linear layer with input a and output gradient δ the gradient of sample b is Σ_t δ_bt a_btᵀ. Where it is projected, the
projection is applied to a, and the (O, I) matrix never exists; the other uses form it for as many samples at a time as
`PIECE_BYTES` holds.
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
from .causal_lm import (
    accumulation_dtype,
    check_layers,
    layer_size,
    linear_layers,
    output_by_input,
    parameter_device,
    parameter_dtype,
)
from .errors import UnusableInput
from .optimizers import Scaling
from .projection import GradientProjection, LayerProjection, plain_projection
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
) -> Gradients:
    """Gradients of each sample's loss with respect to the chosen weights, (n, k) (METHOD 3).

    The loss is the mean cross-entropy of the sample's predicted response tokens. Dropout is off whatever the model's mode. A
    result depends on its own sample only, beyond rounding: not on batch, padding or order. Samples without a predicted
    token have gradient 0 and loss 0. `modules` is as in `linear_layers`; `projection=None` keeps all O x I values of each layer.
    `scaling` multiplies the gradients by a before they are projected; where it is exact each layer's inputs are kept in full for
    the length of a batch, and the gradient is formed in full, `PIECE_BYTES` at a time. `token_budget` bounds the padded tokens of
    a batch; None is a default for the device. `progress` is called after each batch.

    Raises UnusableInput for unknown modules, samples that do not fit the model and families with an unknown output head,
    ValueError for a scaling of other modules, torch.OutOfMemoryError where one sample alone does not fit.
    """
    layers = linear_layers(model, modules)
    if scaling is not None:
        scaling.check(layers)
    use = _PerSample(model, layers, projection, scaling, len(samples))
    loss_n = over_samples(model, samples, layers, use, token_budget=token_budget, progress=progress)
    finite_n = torch.isfinite(use.values).all(dim=1) & torch.isfinite(loss_n)
    return Gradients(values=use.values, loss=loss_n, nonfinite=torch.nonzero(~finite_n).flatten())


def weighted_gradients(
    model: Any,
    samples: Samples,
    weights_nc: Tensor | npt.NDArray[np.float64],
    *,
    modules: str = "down_proj",
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Σ_i w_ic g_i over the samples by layer, (c, O, I), in one pass (METHOD 1, Curvature).

    g_i is the whole gradient of sample i's loss, as in `per_sample_gradients`. float32 (float64 from a float64 model), each on
    its layer's device: the result holds c x d values for the d weights of the chosen layers, so the caller bounds c. Samples
    whose weights are all 0 are not run. Raises as `per_sample_gradients`, UnusableInput where a sample's gradient is not
    finite, naming the samples, ValueError for weights of another shape or not finite.
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
        named = ", ".join(map(str, wrong[:20]))
        raise UnusableInput(f"samples without a finite gradient: {named} ({len(wrong)} in all); give them weight 0")
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
    """Products g_iᵀv_c of each sample's whole gradient with directions, (n, c) on the CPU, in one pass.

    directions: (c, O, I) by layer name, of every chosen layer; copied to the layer's device in float32 (float64 for a float64
    model). Samples without a predicted token have 0; the row of a sample whose gradient is not finite is not finite. Raises as
    `per_sample_gradients`, and ValueError for directions that do not fit the layers.
    """
    layers = linear_layers(model, modules)
    use = _Products(model, layers, directions, len(samples))
    over_samples(model, samples, layers, use, token_budget=token_budget, progress=progress)
    return use.values


def sample_losses(
    model: Any, samples: Samples, *, token_budget: int | None = None, progress: Progress | None = None
) -> Tensor:
    """Mean cross-entropy in nats of each sample's predicted response tokens, (n,) on the CPU: forward passes alone.

    float32 (float64 from a float64 model); 0 for a sample without a predicted token. Raises as `per_sample_gradients`.
    """
    return over_samples(model, samples, {}, None, token_budget=token_budget, progress=progress)


def plain_logits(model: Any, samples: Samples, i: int) -> tuple[Tensor, Tensor]:
    """The model's own logits (R, V) for the predicted tokens of sample i alone, and these tokens (R,)."""
    one = samples.slice(i, i + 1)
    ids_T = torch.from_numpy(one.input_ids.astype(np.int64)).to(parameter_device(model))
    predicted = [place for place in range(1, len(ids_T)) if one.response[place]]
    logits_TV = model(ids_T[None], use_cache=False).logits[0]
    return logits_TV[[place - 1 for place in predicted]], ids_T[predicted]


def plain_loss(model: Any, samples: Samples, i: int) -> Tensor | None:
    """Mean cross-entropy of sample i's predicted tokens; None where there are none. The model is in eval mode."""
    if not samples.slice(i, i + 1).response[1:].any():
        return None
    return nn.functional.cross_entropy(*plain_logits(model, samples, i))


def plain_gradients(
    model: Any,
    samples: Samples,
    *,
    modules: str = "down_proj",
    projection: GradientProjection | None = None,
    scaling: Scaling | None = None,
) -> Tensor:
    """`per_sample_gradients(...).values` by autograd, one sample at a time. The layers' weights require gradients."""
    layers: dict[str, Any] = linear_layers(model, modules)
    weights = [layer.weight for layer in layers.values()]
    rows = []
    for i in range(len(samples)):
        loss = plain_loss(model, samples, i)
        found = [torch.zeros_like(w) for w in weights] if loss is None else torch.autograd.grad(loss, weights)
        whole = {name: output_by_input(layer, g) for (name, layer), g in zip(layers.items(), found, strict=True)}
        if scaling is not None:
            whole = {name: scaling.times(name, G_OI) for name, G_OI in whole.items()}
        rows.append(plain_projection(whole, projection))
    return torch.stack(rows)


def in_pieces(delta_BTO: Tensor, a_BTI: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Gradients in full, (m, O, I), of a few samples at a time, summed over tokens in `dtype`; the slice says which."""
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


class _Rows(Use):
    """Use: some values of each sample, gathered on the device batch by batch and kept on the CPU."""

    def __init__(self, model: Any, count: int, width: int) -> None:
        self.dtype, self.device = accumulation_dtype(parameter_dtype(model)), parameter_device(model)
        self.values = torch.zeros(count, width, dtype=self.dtype)

    def start(self, samples_B: Tensor) -> None:
        self.batch = torch.zeros(len(samples_B), self.values.shape[1], dtype=self.dtype, device=self.device)

    def finish(self, samples_B: Tensor) -> None:
        self.values[samples_B] = self.batch.cpu()
        del self.batch


class _PerSample(_Rows):
    """The (scaled, projected) gradient of each sample, (n, k)."""

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, nn.Module],
        projection: GradientProjection | None,
        scaling: Scaling | None,
        count: int,
    ) -> None:
        sizes = {name: layer_size(module) for name, module in layers.items()}
        weights = sum(out * into for out, into in sizes.values())
        if projection is not None and not projection.reduces(sizes.values()):
            projection = None
        super().__init__(model, count, weights if projection is None else projection.dim)
        self.exact = scaling if scaling is not None and scaling.full else None
        self.projections: dict[str, LayerProjection] = {}
        self.sides: dict[str, tuple[_Side, _Side]] = {}
        self.columns: dict[str, slice] = {}
        start = 0
        for name, (out, into) in sizes.items():
            R_Iq, self.columns[name] = None, slice(start, start + out * into)
            start += out * into
            if projection is not None:
                self.projections[name] = projection.layer(name, out, into, dtype=self.dtype)
                R_Iq, self.columns[name] = self.projections[name].R_Iq, slice(projection.dim)
            row, column = scaling.factors[name] if scaling is not None and scaling.factors else (None, None)
            self.sides[name] = _Side(None, row), _Side(R_Iq, column)

    def save_input(self, layer: str, a_BTI: Tensor) -> Tensor:
        return a_BTI if self.exact is not None else self.sides[layer][1].apply(a_BTI).to(self.dtype)

    def on_output_grad(self, layer: str, saved_BTq: Tensor, delta_BTO: Tensor) -> None:
        columns = self.columns[layer]
        for part, G_mOq in in_pieces(self.sides[layer][0].apply(delta_BTO), saved_BTq, self.dtype):
            if self.exact is not None:  # nothing was projected on the way: q is I
                G_mOq *= self.exact.full[layer].to(G_mOq)
            if layer in self.projections:
                found = self.projections[layer] = self.projections[layer].to(G_mOq)  # copies at the first batch only
                values_mk = found.fold(G_mOq if self.exact is None else found.project_input(G_mOq))
            else:
                values_mk = G_mOq.flatten(1)
            self.batch[part, columns] += values_mk.to(self.device)


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
        device = self.finite_n.device
        self.samples_B, self.weights_Bc = samples_B.to(device), self.weights_nc[samples_B].to(device)

    def on_output_grad(self, layer: str, saved_BTq: Tensor, delta_BTO: Tensor) -> None:
        for x in (saved_BTq, delta_BTO):  # a sum is finite where all its terms are
            finite_B = torch.isfinite(x.sum(dim=(1, 2), dtype=self.dtype))
            self.finite_n[self.samples_B] &= finite_B.to(self.finite_n.device)
        weights_Bc = self.weights_Bc.to(delta_BTO.device)
        sum_cOI = self.sums[layer]
        if sum_cOI.shape[0] == 1:  # tokens of all samples at once: no gradient of a single one is formed
            delta_NO = (delta_BTO.to(self.dtype) * weights_Bc[:, :, None]).flatten(0, 1)
            sum_cOI[0].addmm_(delta_NO.T, saved_BTq.to(delta_NO).flatten(0, 1))
            return
        for part, G_mOI in in_pieces(delta_BTO, saved_BTq, self.dtype):
            sum_cOI.flatten(1).addmm_(weights_Bc[part].T, G_mOI.flatten(1))


class _Products(_Rows):
    """The inner products of each sample's gradient with directions, (n, c)."""

    def __init__(
        self, model: Any, layers: Mapping[str, nn.Module], directions: Mapping[str, Tensor], count: int
    ) -> None:
        super().__init__(model, count, check_layers("directions", layers, directions))
        self.directions = {
            name: directions[name].to(next(module.parameters()).device, self.dtype).flatten(1)
            for name, module in layers.items()
        }

    def on_output_grad(self, layer: str, saved_BTq: Tensor, delta_BTO: Tensor) -> None:
        for part, G_mOI in in_pieces(delta_BTO, saved_BTq, self.dtype):
            self.batch[part] += (G_mOI.flatten(1) @ self.directions[layer].T).to(self.device)
