"""Imports a GGUF file as a registered model: de-quantised once, kept as plain safetensors.

    python -m worker.loading.gguf FILE.gguf FOLDER

transformers reads GGUF but marks the model as quantised and refuses to save it; so a plain model is built from the
configuration, takes the de-quantised weights, and is saved.
"""

import argparse
import copy
import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging


def import_gguf(file: Path, folder: Path) -> None:
    """Writes config, weights (float32 safetensors) and tokenizer to `folder`, which appears whole or not at all.

    Raises:
        FileExistsError: the folder is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it to import the model again")
    source = {"gguf_file": file.name, "local_files_only": True}
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    config = copy.deepcopy(quantised.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Import a GGUF file as a registered model")
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path, help="its name is the name of the model")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    try:
        import_gguf(arguments.file, arguments.folder)
    except FileExistsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
