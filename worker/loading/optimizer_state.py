"""The optimizer state registered beside a model, which takes the place of a warm-up."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from service.models.registry import OPTIMIZER_STATE
from worker.errors import ParameterError
from worker.influence.causal_lm import linear_layers
from worker.loading import adapters
from worker.loading.folders import ModelFolder
from worker.loading.models import load_config


def check_optimizer_state(folder: ModelFolder, modules: str, optimizer: Mapping[str, Any]) -> None:
    """Checks the registered state of the layers that influence is measured on, by the headers alone (METHOD 7).

    `modules` is `gradient.modules`, of which an adapter's are independent; `optimizer` the job's.

    Raises:
        ParameterError: there is no state, it is of another optimizer, or it lacks a parameter or has it in another shape;
            names it.
        UnusableInput: `modules` matches no layer.
    """
    path = folder.path / OPTIMIZER_STATE
    if not path.is_file():
        raise ParameterError(
            f"optimizer.type {optimizer['type']} needs a warmup, or {OPTIMIZER_STATE} in the model's folder."
        )
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ParameterError(f"The model's {OPTIMIZER_STATE} is not a safetensors file: {error}") from error
    if optimizer["type"] == "sgd" and (adam := next((name for name in shapes if name.startswith("second.")), None)):
        # Its first moment is a mean, the momentum of SGD a sum: ten times as large, at the usual decay.
        raise ParameterError(
            f"The model's {OPTIMIZER_STATE} is an Adam state (it has {adam}), not one of sgd momentum: use optimizer.type adam"
            " or adamw, or omit optimizer.momentum."
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(folder))
        if folder.is_adapter:
            adapters.inject_registered(model, folder.path)
    names = {module: name for name, module in model.named_modules()}
    layer: Any
    for layer in linear_layers(model, "lora" if folder.is_adapter else modules).values():
        for moment in ("first",) if optimizer["type"] == "sgd" else ("first", "second"):
            name, wanted = f"{moment}.{names[layer]}.weight", tuple(layer.weight.shape)
            if shapes.get(name) != wanted:
                found = f"as {shapes[name]}" if name in shapes else "not at all"
                raise ParameterError(
                    f"The model's {OPTIMIZER_STATE} must have {name} of shape {wanted}, but has it {found}: save it with"
                    " worker.influence.save_state from the training of this model, or request a warmup."
                )
