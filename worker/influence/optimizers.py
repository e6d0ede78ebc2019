"""What an optimiser's state makes of a gradient: the scaling a and the offset b of its next step (METHOD 1 and 3).

With the second moment v held after s finished steps, the next update is -η (a ⊙ g + b). State is matched by the name of the
parameter in `model.named_parameters()`; nothing is guessed where it is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .causal_lm import accumulation_dtype, layer_size, linear_layers, output_by_input, parameter_dtype
from .errors import UnusableInput


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerOptions:
    """The optimiser whose step is asked about, as in torch.optim: `momentum` is of sgd, `betas` and `eps` of adam and adamw.

    `weight_decay` is decoupled for adamw and part of the gradient for sgd and adam. Raises ValueError for an unknown type.
    """

    type: Literal["none", "sgd", "adam", "adamw"] = "none"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.type not in ("none", "sgd", "adam", "adamw"):
            raise ValueError(f"type must be none, sgd, adam or adamw, not {self.type!r}")

    @property
    def is_adam(self) -> bool:
        return self.type in ("adam", "adamw")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OptimizerState:
    """State after `step` finished steps, by parameter name, each tensor of the shape in which the parameter is stored.

    first: Adam's first moment (`exp_avg`) or SGD's momentum buffer.  second: Adam's second moment (`exp_avg_sq`); empty for SGD.
    """

    step: int
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]


def state_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerState:
    """The state of a torch Adam, AdamW or SGD by the names of the model's parameters; it shares memory with the optimiser.

    Parameters that were never stepped have none and are left out. Raises UnusableInput where the optimiser holds a parameter
    that is not the model's, or parameters that were stepped different numbers of times.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    steps: set[int] = set()
    for parameter, values in optimizer.state.items():
        if parameter not in names:
            raise UnusableInput(f"the optimizer holds a parameter of shape {tuple(parameter.shape)} not of this model")
        buffer = values.get("exp_avg", values.get("momentum_buffer"))
        if buffer is not None:
            first[names[parameter]] = buffer.detach()
        if "exp_avg_sq" in values:
            second[names[parameter]] = values["exp_avg_sq"].detach()
            steps.add(int(values["step"]))
    if len(steps) > 1:
        raise UnusableInput(f"the optimizer's parameters were stepped {sorted(steps)} times: one number is needed")
    return OptimizerState(step=steps.pop() if steps else 0, first=first, second=second)


def save_state(state: OptimizerState, path: str | PathLike[str]) -> None:
    """Write the state as one safetensors file: tensors `first.<name>` and `second.<name>`, metadata `step`."""
    tensors = {f"first.{name}": tensor.contiguous() for name, tensor in state.first.items()}
    tensors |= {f"second.{name}": tensor.contiguous() for name, tensor in state.second.items()}
    save_file(tensors, path, metadata={"step": str(state.step)})


def load_state(path: str | PathLike[str]) -> OptimizerState:
    """Read what `save_state` wrote, onto the CPU. Raises UnusableInput where the file is no such state."""
    moments: dict[str, dict[str, Tensor]] = {"first": {}, "second": {}}
    try:
        with safe_open(path, framework="pt") as file:
            step = (file.metadata() or {}).get("step", "")
            for key in file.keys():  # noqa: SIM118 (no mapping)
                moment, _, name = key.partition(".")
                if moment not in moments or not name:
                    raise UnusableInput(f"{path}: tensor {key!r} is neither first.<parameter> nor second.<parameter>")
                moments[moment][name] = file.get_tensor(key)
    except SafetensorError as error:
        raise UnusableInput(f"{path} is not a safetensors file: {error}") from error
    if not step.isdecimal():
        raise UnusableInput(f"{path}: the metadata must have the number of finished steps as `step`, not {step!r}")
    return OptimizerState(step=int(step), first=moments["first"], second=moments["second"])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scaling:
    """a of METHOD 1 by layer name: in full, or rank-one factors, on the layers' devices.

    full: (O, I) each, as many values as the layers have; empty where factored.
    factors: (O,) and (I,) each, positive, a being about their outer product; empty where exact.
    relative_error: of their outer product a₁, |a - a₁| / |a| in the Frobenius norm over all layers; None where exact.
    layer_errors: the same of each layer.
    """

    full: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    relative_error: float | None = None
    layer_errors: Mapping[str, float] = field(default_factory=dict)

    def times(self, layer: str, gradient_OI: Tensor) -> Tensor:
        """a ⊙ gradient of the layer of that name: (..., O, I) -> (..., O, I). Raises ValueError where the layer is unknown."""
        self.check([layer])
        if self.full:
            return gradient_OI * self.full[layer]
        row_O, column_I = self.factors[layer]
        return gradient_OI * row_O[:, None] * column_I

    def check(self, layers: Any) -> None:
        """Raise ValueError that names the layers for which there is no scaling."""
        known = self.full or self.factors
        missing = [name for name in layers if name not in known]
        if missing:
            raise ValueError(
                f"scaling has no layer {missing[0]} ({len(missing)} missing): make it for the same modules"
            )


def gradient_scaling(
    model: Any,
    modules: str,
    options: OptimizerOptions,
    state: OptimizerState | None,
    kind: Literal["exact", "factored"] = "exact",
) -> Scaling | None:
    """The scaling a of the chosen layers' gradients; None for `none` and `sgd`, whose a is 1 (METHOD 1 and 3).

    float32, float64 for a float64 model. `factored` keeps rank-one factors of each layer's a (`rank_one`) and measures their
    error; a itself is then held for one layer at a time. Raises UnusableInput that names the parameter whose state is
    missing, mis-shaped or no second moment, ValueError for an unknown `kind`.
    """
    if kind not in ("exact", "factored"):
        raise ValueError(f"scaling kind must be exact or factored, not {kind!r}")
    if not options.is_adam:
        return None
    weights = layer_weights(model, modules)
    if kind == "exact":
        return Scaling(full={name: _adam_scale(options, state, weight) for name, weight in weights.items()})
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    lost, whole = {}, {}
    for name, weight in weights.items():
        a_OI = _adam_scale(options, state, weight)
        factors[name] = rank_one(a_OI)
        lost[name] = float((a_OI - torch.outer(*factors[name])).square().sum(dtype=torch.float64))
        whole[name] = float(a_OI.square().sum(dtype=torch.float64))
    return Scaling(
        factors=factors,
        relative_error=(sum(lost.values()) / sum(whole.values())) ** 0.5,
        layer_errors={name: (lost[name] / whole[name]) ** 0.5 for name in weights},
    )


def step_offset(
    model: Any, modules: str, options: OptimizerOptions, state: OptimizerState | None
) -> dict[str, Tensor] | None:
    """The part b of the next update that no gradient changes, by layer, (O, I); None where it is zero everywhere (METHOD 1).

    Momentum, and weight decay. Raises as `gradient_scaling`, and where the weight of a quantised layer were to decay.
    """
    carries = options.betas[0] > 0 if options.is_adam else options.type == "sgd" and options.momentum > 0
    decays = options.type != "none" and options.weight_decay > 0
    if not carries and not decays:
        return None
    return {name: _offset(options, state, weight) for name, weight in layer_weights(model, modules).items()}


def rank_one(a_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (O,) and (I,) of a positive matrix a by Adafactor's rule: row and column means of the second moment 1 / a².

    Exact where a has rank one. The best factors in the Frobenius norm follow the largest a, where gradients are smallest: a
    single weight that never had a gradient would decide them, and influence is less well ranked.
    """
    least = a_OI.double().min()
    moment_OI = (least / a_OI.double()).square()  # relative, so that no eps underflows
    row_O, column_I, half = moment_OI.mean(dim=1), moment_OI.mean(dim=0), (least * moment_OI.mean().sqrt()).sqrt()
    return (half * row_O.rsqrt()).to(a_OI.dtype), (half * column_I.rsqrt()).to(a_OI.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeight:
    """The weight of a chosen layer: where it is, what `model.named_parameters()` calls it, and the dtype to compute in."""

    module: nn.Module
    name: str
    dtype: torch.dtype

    def moment(self, state: OptimizerState | None, which: Literal["first", "second"]) -> Tensor:
        """A moment as (O, I), on the layer's device. Raises UnusableInput that names the parameter and says what to do."""
        moments: Mapping[str, Tensor] = {} if state is None else getattr(state, which)
        if self.name not in moments:
            raise UnusableInput(
                f"the optimizer state has no {which} moment of {self.name} (it has {len(moments)} parameters): "
                "warm the model up, or register the state of the optimizer that trained this parameter"
            )
        moment = moments[self.name]
        stored = tuple(output_by_input(self.module, torch.empty(layer_size(self.module), device="meta")).shape)
        if tuple(moment.shape) != stored:
            raise UnusableInput(
                f"the optimizer state of {self.name} has shape {tuple(moment.shape)}, the parameter {stored}: "
                "register the state of this model, with the parameter as it is stored"
            )
        return output_by_input(self.module, moment.to(next(self.module.parameters()).device, self.dtype))

    def value(self) -> Tensor:
        """The weight as (O, I)."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        if not weight.is_floating_point():
            raise UnusableInput(f"weight_decay of {self.name}: a quantised weight does not decay; measure on adapters")
        return output_by_input(self.module, weight.detach().to(self.dtype))


def layer_weights(model: Any, modules: str) -> dict[str, LayerWeight]:
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    dtype = accumulation_dtype(parameter_dtype(model))
    chosen = linear_layers(model, modules)
    return {layer: LayerWeight(module=module, name=names[module], dtype=dtype) for layer, module in chosen.items()}


def _adam_scale(options: OptimizerOptions, state: OptimizerState | None, weight: LayerWeight) -> Tensor:
    """a = (1 - β₁) / (1 - β₁^(s+1)) / (√(v / (1 - β₂^(s+1))) + eps), (O, I)."""
    second_OI = weight.moment(state, "second")
    assert state is not None
    if state.step < 1:
        raise UnusableInput(f"the optimizer state is of step {state.step}: Adam's needs at least 1 finished step")
    if not ((second_OI >= 0) & second_OI.isfinite()).all():
        raise UnusableInput(f"the second moment of {weight.name} is negative or not finite somewhere: train it again")
    beta1, beta2 = options.betas
    next_step = state.step + 1
    root_OI = (second_OI / (1 - beta2**next_step)).sqrt() + options.eps
    return (1 - beta1) / (1 - beta1**next_step) / root_OI


def _offset(options: OptimizerOptions, state: OptimizerState | None, weight: LayerWeight) -> Tensor:
    """b of one layer, (O, I): a ⊙ β₁ / (1 - β₁) m for Adam, momentum m for SGD, and the weight decay."""
    carried_OI = decay_OI = torch.zeros((), dtype=weight.dtype)
    if options.weight_decay:
        decay_OI = options.weight_decay * weight.value()
    if not options.is_adam:
        if options.momentum:
            carried_OI = options.momentum * weight.moment(state, "first")
        return carried_OI + decay_OI
    a_OI = _adam_scale(options, state, weight)
    carried_OI = options.betas[0] / (1 - options.betas[0]) * weight.moment(state, "first")
    if options.type == "adam":  # torch's Adam adds the decay to the gradient, AdamW to the update
        return a_OI * (carried_OI + decay_OI)
    return a_OI * carried_OI + decay_OI
