"""A model's input embeddings, read from its files without loading it."""

from collections.abc import Iterator

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from worker.errors import ModelError
from worker.loading.folders import ModelFolder, blaming_the_model
from worker.loading.models import load_config

_ROWS = 4096  # of the matrix at a time: some 64 MB at the width of a large model


def input_embedding_blocks(folder: ModelFolder) -> Iterator[Tensor]:
    """The rows of the matrix, one block (b, D) after the other, in the dtype that they are stored in; of an adapter, its base's.

    Raises:
        ModelError: the files do not have it, or in another shape than the configuration says.
    """
    base = folder.base or folder
    config = load_config(folder)
    with blaming_the_model("The model's input embeddings could not be read"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        wanted = model.get_input_embeddings().weight
        # A matrix that is the output layer's too is stored once, under either name.
        names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is wanted]
        for path in base.weights:
            with safe_open(path, framework="pt") as file:
                for name in names:
                    stored = next((key for key in file.keys() if _is_same(key, name)), None)  # noqa: SIM118 (no mapping)
                    if stored is None:
                        continue
                    rows = file.get_slice(stored)
                    if tuple(rows.get_shape()) != tuple(wanted.shape):
                        raise ModelError(
                            f"The model's {stored} has not the shape {tuple(wanted.shape)} of its config.json."
                        )
                    for start in range(0, wanted.shape[0], _ROWS):
                        yield rows[start : min(start + _ROWS, wanted.shape[0])]
                    return
    raise ModelError(f"The model's files have no input embeddings ({names[0]}).")


def _is_same(stored: str, name: str) -> bool:
    """Files of a base model name a parameter without the first part of its name, those of a larger model with a part more."""
    return stored == name or name.endswith(f".{stored}") or stored.endswith(f".{name}")
