"""What is put on top of a loaded model: LoRA adapters, and the checkpoint of a warm-up.

Adapters are injected (peft) into the transformers model, whose class stays what it was. Their weights are float32 whatever the
dtype of the base: they are what is trained, and small. Most jobs have none, and peft takes seconds to import: functions do it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from service.models.configs import ADAPTER_CONFIG, entries, read_adapter_config
from service.models.registry import adapter_problem
from worker.errors import ModelError, ParameterError
from worker.influence.causal_lm import block_list, linear_size

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PARTS: Mapping[str, tuple[str, ...]] = {"attention": ("self_attn", "attn", "attention"), "mlp": ("mlp",)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a warm-up trains, by full name: a model's adapters, or all of them if it has none."""
    parameters = dict(model.named_parameters())
    return {name: p for name, p in parameters.items() if ".lora_" in name} or parameters


def target_modules(model: Any, modules: str) -> list[str]:
    """The linear layers of a block that `all-linear`, `attention` or `mlp` means, by the ends of their names (`mlp.down_proj`).

    Raises:
        ParameterError: the model has none of these; lists those it has.
    """
    _, blocks = block_list(model.base_model)
    linear = (name.split(".", 1)[1] for name, module in blocks.named_modules() if linear_size(module) is not None)
    ends = sorted(set(linear))
    chosen = [end for end in ends if modules == "all-linear" or end.split(".")[0] in _PARTS[modules]]
    if not chosen:
        raise ParameterError(
            f"warmup.lora.modules is {modules}; the model's linear layers are {', '.join(ends) or 'none'}."
        )
    return chosen


def add_lora(model: PreTrainedModel, lora: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Injects new adapters, which change nothing until they are trained; returns the configuration that makes them.

    `lora` is `warmup.lora` of the job's parameters.

    Raises:
        ParameterError: the model has adapters already, or none of the named layers.
    """
    from peft import LoraConfig

    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ParameterError(
            "warmup.lora: the model is already an adapter; omit warmup.lora, and that adapter is trained."
        )
    added = {"r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": target_modules(model, lora["modules"])}
    with torch.random.fork_rng(devices=[]):  # adapters begin on the CPU
        torch.manual_seed(seed)
        _inject(model, LoraConfig(**added))
    return added


def _inject(model: PreTrainedModel, config: "LoraConfig") -> None:
    from peft import inject_adapter_in_model

    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())  # of GPT-2
    config.lora_dropout = 0.0  # the loss that is trained and measured is that of the whole model
    config.init_lora_weights = True  # another start would change the base's weights or be overwritten at once
    inject_adapter_in_model(config, model)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    model.eval()  # new modules begin in training mode


def inject_registered(model: PreTrainedModel, folder: Path) -> None:
    """Injects the registered adapter of the folder without loading its weights.

    Raises:
        ModelError: it is not a plain LoRA, or names layers that the model does not have.
    """
    from peft import LoraConfig

    try:
        if problem := adapter_problem(entries(read_adapter_config(folder / ADAPTER_CONFIG))):
            raise ModelError(f"The adapter cannot be used: {problem}.")
        _inject(model, LoraConfig.from_pretrained(str(folder)))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"The adapter could not be loaded: {error}") from error


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Injects the registered adapter of the folder, with its weights.

    Raises:
        ModelError: it is not a plain LoRA, or its weights do not fit the model.
    """
    from peft import set_peft_model_state_dict

    inject_registered(model, folder)
    try:
        tensors = {name.removeprefix("base_model.model."): t for name, t in load_file(folder / ADAPTER_WEIGHTS).items()}
        loaded: Any = set_peft_model_state_dict(model, tensors)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"The adapter's weights could not be loaded: {error}") from error
    _check_complete([name for name in loaded.missing_keys if ".lora_" in name], loaded.unexpected_keys, "adapter")


def save_checkpoint(model: PreTrainedModel, path: Path, added: Mapping[str, Any] | None) -> None:
    """Writes what a warm-up trained, float32, by full parameter name; and what `add_lora` returned, if it added adapters."""
    tensors = {name: p.detach().contiguous() for name, p in trainable(model).items()}
    save_file(tensors, path, metadata=None if added is None else {"lora": json.dumps(added)})


@torch.no_grad()
def load_checkpoint(model: PreTrainedModel, path: Path) -> None:
    """Loads what `save_checkpoint` wrote into the model that the warm-up started from, in the model's own dtype.

    Raises:
        ModelError: the checkpoint is not of this model.
    """
    from peft import LoraConfig

    with safe_open(path, framework="pt") as file:
        if added := (file.metadata() or {}).get("lora"):
            _inject(model, LoraConfig(**json.loads(added)))
        parameters, names = trainable(model), set(file.keys())
        _check_complete(sorted(parameters.keys() - names), sorted(names - parameters.keys()), "warm-up's checkpoint")
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(name))


def _check_complete(missing: list[str], unexpected: list[str], what: str) -> None:
    if missing:
        raise ModelError(f"The {what} lacks {len(missing)} of the weights, including {missing[0]}.")
    if unexpected:
        raise ModelError(
            f"The {what} has {len(unexpected)} weights that the model does not have, including {unexpected[0]}."
        )
