"""Loads a job's model: configuration, tokenizer and weights; safetensors only, and never code of the model's."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from service.models.configs import MAX_BLOCKS
from service.models.registry import MODEL_TYPES
from worker.errors import ModelError, OutOfMemory
from worker.loading import adapters, placement
from worker.loading.folders import ModelFolder, blaming_the_model


def load_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase:
    """The fast tokenizer of the folder.

    Raises:
        ModelError: it has none, or only a slow one, which does not give the positions of tokens in the text.
    """
    with blaming_the_model("The model's tokenizer could not be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder.tokenizer_folder.path, use_fast=True, trust_remote_code=False, local_files_only=True
        )
    if not tokenizer.is_fast:
        raise ModelError("The model has no fast tokenizer (tokenizer.json).")
    return tokenizer


def load_config(folder: ModelFolder) -> Any:
    """The configuration; of an adapter, that of its base.

    Raises:
        ModelError: it cannot be read, or the architecture is not one that is supported.
    """
    with blaming_the_model("The model's configuration could not be read"):
        config = AutoConfig.from_pretrained(
            (folder.base or folder).path, trust_remote_code=False, local_files_only=True
        )
    if config.model_type not in MODEL_TYPES:
        raise ModelError(
            f"Models of type {config.model_type!r} are not supported; {', '.join(sorted(MODEL_TYPES))} are."
        )
    if not 0 < config.num_hidden_layers <= MAX_BLOCKS:
        raise ModelError(f"The model has {config.num_hidden_layers} blocks; 1 to {MAX_BLOCKS} are supported.")
    return config


def load_model(
    folder: ModelFolder, dtype: torch.dtype, device: torch.device, quantization: str = "none"
) -> PreTrainedModel:
    """The causal language model in evaluation mode; of an adapter, its base with the adapter in it.

    On CUDA, a model that does not fit one GPU's free memory is spread over all of the machine's, block by block.

    Raises:
        ModelError: the weights do not fit the configuration, or some of them are missing.
        ParameterError: it cannot be quantised here, or is too large for this machine.
        OutOfMemory: the device has no room for it now.
    """
    load_config(folder)
    try:
        model = _load_base(folder.base or folder, dtype, device, quantization)
        if folder.base is not None:
            adapters.load_adapter(model, folder.path)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            "The model's weights do not fit on the device: use dtype bfloat16, or quantization int8 or nf4."
        ) from error
    model.eval()
    return model


def _load_base(folder: ModelFolder, dtype: torch.dtype, device: torch.device, quantization: str) -> PreTrainedModel:
    config, free = placement.quantised(quantization, dtype), placement.free_memory(device)
    where: dict[str, Any] = {}
    with blaming_the_model("The model could not be loaded"):
        if len(free) > 1:
            needed = placement.weight_bytes(folder.weights, dtype, quantization)
            shares = placement.share_out(needed, free)
            where = {} if shares is None else {"device_map": "auto", "max_memory": shares}
        if config is not None:  # it quantises while it reads, so it must know the device
            where = {"device_map": {"": device}} | where | {"quantization_config": config}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **where,
        )
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers would go on with random values in their place
        raise ModelError(f"The model lacks {len(missing)} of its weights, including {missing[0]}.")
    if config is not None:
        placement.check_derivative(model)
    if not where:
        model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its signature
    return model
