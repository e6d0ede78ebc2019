"""Finding, checking and loading a job's model: registered folders and hub snapshots; safetensors only, never remote code."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from service.models import MODEL_TYPES
from worker.errors import ModelError, UnitError

log = logging.getLogger(__name__)

# The files that decide what is computed; a folder's other files (readme, pickled weights) are never read.
_PATTERNS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template*",
    "added_tokens.json",
)


class HubUnavailable(UnitError):
    """The hub did not deliver the files of the pinned commit."""

    code, retryable = "hub_unavailable", True


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model's files on this machine. `fingerprint` is the sha256 over the names and hashes of those that count."""

    path: Path
    files: dict[str, str]
    signature: tuple[tuple[Any, ...], ...]

    @property
    def is_current(self) -> bool:
        """Whether the files are those that were hashed, by their sizes and times."""
        return self.path.is_dir() and _signature(_files_that_count(self.path)) == self.signature

    @property
    def fingerprint(self) -> str:
        return _digest(self.files)

    @property
    def tokenizer_fingerprint(self) -> str:
        return _digest({name: sha for name, sha in self.files.items() if _matches(Path(name), _TOKENIZER_PATTERNS)})


def _digest(files: Mapping[str, str]) -> str:
    lines = "".join(f"{name} {sha}\n" for name, sha in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def find(model: Mapping[str, Any], registered: Path) -> ModelFolder:
    """The folder of a job's resolved model, fetched from the hub where it is not here yet.

    Raises:
        ModelError: the folder is gone, or lacks files.
        HubUnavailable: the hub did not answer.
    """
    path = registered / model["name"] if model["kind"] == "registered" else _snapshot(model)
    if not (path / "config.json").is_file():
        raise ModelError(f"The model {model.get('name') or model.get('id')!r} has no config.json on this worker.")
    wanted = _files_that_count(path)
    if not any(p.suffix == ".safetensors" for p in wanted):
        raise ModelError("The model has no safetensors weights; other formats are not loaded.")
    return ModelFolder(path, {p.name: _file_sha256(p) for p in wanted}, _signature(wanted))


def _files_that_count(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if _matches(p, _PATTERNS + _TOKENIZER_PATTERNS) and p.is_file())


def _signature(files: Iterable[Path]) -> tuple[tuple[Any, ...], ...]:
    """What changes when one of the files is written or replaced."""
    stats = ((p.name, p.stat()) for p in files)
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)


def _snapshot(model: Mapping[str, Any]) -> Path:
    try:
        folder = snapshot_download(
            model["id"], revision=model["commit"], allow_patterns=[*_PATTERNS, *_TOKENIZER_PATTERNS]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise HubUnavailable(
            f"The hub did not deliver {model['id']} at {model['commit']}: {type(error).__name__}."
        ) from error
    return Path(folder)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase:
    """The fast tokenizer of the folder.

    Raises:
        ModelError: it has none, or only a slow one, which cannot tell where a token stands in the text.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder.path, use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The model's tokenizer could not be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError("The model has no fast tokenizer (tokenizer.json).")
    return tokenizer


def load_config(folder: ModelFolder) -> Any:
    """The configuration.

    Raises:
        ModelError: it cannot be read, or the architecture is not one that is supported.
    """
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The model's configuration could not be read: {error}") from error
    if config.model_type not in MODEL_TYPES:
        raise ModelError(
            f"Models of type {config.model_type!r} are not supported; {', '.join(sorted(MODEL_TYPES))} are."
        )
    return config


def load_model(folder: ModelFolder, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The causal language model in evaluation mode.

    Raises:
        ModelError: the weights do not fit the configuration, or some of them are missing.
    """
    load_config(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"The model could not be loaded: {error}") from error
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers would go on with random values in their place
        raise ModelError(f"The model lacks {len(missing)} of its weights, {missing[0]} among them.")
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its signature
    model.eval()
    return model


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        RuntimeError: CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("WINNOW_WORKER__DEVICE is cuda, but torch sees no CUDA device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it natively (Ampere and later, AVX512-BF16 or AMX), else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32
