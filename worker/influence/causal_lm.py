"""What the rest of the package needs to know about a transformers causal language model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import UnusableInput
from .samples import Samples

MLP_OUTPUT_NAMES = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h")


def parameter_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first parameter that is not quantised: that of the embeddings, and so of the hidden states."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def parameter_device(model: Any) -> torch.device:
    """Where inputs go: the device of the input embeddings. Other parts of the model may be on others."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for a float64 model, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_list(base: Any) -> tuple[str, nn.ModuleList]:
    """Attribute name and list of the decoder blocks of a base model (`layers` or `h`)."""
    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList) and name in ("layers", "h", "blocks"):
            return name, child
    raise UnusableInput(f"{type(base).__name__} has no list of decoder blocks named layers, h or blocks")


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, None for another module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):  # GPT-2 stores the weight as (in, out)
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return None


def layer_size(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of one of the `linear_layers`."""
    size = linear_size(layer)
    assert size is not None
    return size


def output_by_input(module: nn.Module, stored: Tensor) -> Tensor:
    """A tensor of the shape in which the layer stores its weight, as (O, I); its own inverse."""
    return stored.T if isinstance(module, Conv1D) else stored


def linear_layers(model: Any, modules: str) -> dict[str, nn.Module]:
    """The block layers that influence is measured on, by name, in model order.

    `down_proj` is a role: the output projection of the MLP, under whatever name the family gives it. `lora` is every adapter
    layer of a model with peft adapters. Any other value is the end of a layer's name, such as `self_attn.o_proj`. A layer that an
    adapter wraps keeps its own name, so that its projection stays the same. Raises UnusableInput that
    lists the linear layers.
    """
    prefix, blocks = block_list(model.base_model)
    found = ((name, module) for name, module in blocks.named_modules() if linear_size(module) is not None)
    linear = {f"{prefix}.{name.removesuffix('.base_layer')}": module for name, module in found}
    if modules == "lora":
        chosen = {name: layer for name, layer in linear.items() if {"lora_A", "lora_B"} & set(name.split("."))}
    else:
        ends = MLP_OUTPUT_NAMES if modules == "down_proj" else (modules,)
        chosen = {name: layer for name, layer in linear.items() if any(f".{name}".endswith(f".{end}") for end in ends)}
    if not chosen:
        kinds = sorted({name.split(".", 2)[-1] for name in linear})
        listed = ", ".join(kinds) if kinds else "none"
        raise UnusableInput(f"modules={modules!r} matches no linear layer; the decoder blocks have: {listed}")
    return chosen


def check_layers(what: str, chosen: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> int:
    """The c of `values` (c, O, I) by layer; raises ValueError where they are not one for each chosen layer, of its size."""
    if set(values) != set(chosen):
        raise ValueError(f"{what}: must have the chosen layers {sorted(chosen)}, not {sorted(values)}")
    count = next(iter(values.values())).shape[0]
    for name, module in chosen.items():
        shape = (count, *layer_size(module))
        if tuple(values[name].shape) != shape:
            raise ValueError(f"{what}: {name} must be {shape}, not {tuple(values[name].shape)}")
    return count


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Dropout off and no parameter requiring a gradient; both are put back afterwards."""
    training = [module for module in model.modules() if module.training]
    required = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes else repacks a 4-bit weight in eval mode on a processor, for a kernel without a derivative:
            # the gradients of all layers before it would be wrong without an error.
            vars(module)["support_avx512bf16_for_cpu"] = False
    for p in required:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in required:
            p.requires_grad_(True)
        for module in training:
            module.training = True


def hidden_states(model: Any, base: Any, ids_BT: Tensor) -> Tensor:
    """Last hidden state of `base` (the model's own base or a slice of it), after its final norm: (B, T, D)."""
    embedded_BTD = model.get_input_embeddings()(ids_BT)
    hidden: Tensor = base(inputs_embeds=embedded_BTD, use_cache=False).last_hidden_state
    return hidden


def head_logits(model: Any, hidden_RD: Tensor) -> Tensor:
    """Logits (R, V) of the language-model head, including Gemma's soft-capping."""
    logits_RV: Tensor = model.get_output_embeddings()(hidden_RD)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits_RV if cap is None else torch.tanh(logits_RV / cap) * cap


_heads_checked: WeakSet[Any] = WeakSet()


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raise UnusableInput where `head_logits` is not what the model itself computes (a family that scales its logits).

    Two short passes, once for each model object.
    """
    if model in _heads_checked:
        return
    ids_BT = torch.arange(3, device=parameter_device(model)).unsqueeze(0)
    own_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
    ours_BTV = head_logits(model, hidden_states(model, model.base_model, ids_BT)).float()
    tolerance = 5e-2 if parameter_dtype(model) in (torch.bfloat16, torch.float16) else 1e-3
    if not torch.allclose(own_BTV, ours_BTV, atol=tolerance * float(own_BTV.abs().max()), rtol=0.0, equal_nan=True):
        raise UnusableInput(f"{type(model).__name__} changes its logits after the output embedding in an unknown way")
    _heads_checked.add(model)


def check_samples(model: Any, samples: Samples) -> None:
    """Raise UnusableInput for token ids outside of the vocabulary and samples longer than the model's context."""
    rows = model.get_input_embeddings().weight.shape[0]
    wrong = np.flatnonzero((samples.input_ids < 0) | (samples.input_ids >= rows))
    if wrong.size:
        sample = int(np.searchsorted(samples.offsets, wrong[0], side="right")) - 1
        raise UnusableInput(
            f"sample {sample} has token id {samples.input_ids[wrong[0]]}, outside of the model's vocabulary of {rows}: "
            "tokenise with the model's own tokeniser"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(samples) and int(samples.lengths.max()) > context:
        sample = int(samples.lengths.argmax())
        raise UnusableInput(
            f"sample {sample} has {samples.lengths[sample]} tokens but the model's context is {context}: "
            "lower the maximum sample length"
        )


def first_blocks(base: Any, count: int) -> Any:
    """The base model cut after `count` blocks, its final norm kept; shares every parameter with `base`."""
    name, blocks = block_list(base)
    if not 1 <= count <= len(blocks):
        raise UnusableInput(f"blocks must be from 1 to the model's {len(blocks)} layers, not {count}")
    cut = copy.copy(base)
    cut._modules = dict(base._modules)
    cut._modules[name] = nn.ModuleList(list(blocks)[:count])
    cut.__dict__.pop("forward", None)  # accelerate's hooks put one here, which would run the whole base and not the cut
    return cut
