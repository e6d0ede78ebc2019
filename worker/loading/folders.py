"""The folder of a job's model on this machine, registered or fetched from the hub, and what its files hash to."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from service.models.configs import ADAPTER_CONFIG, CONFIG, UnusableConfig, read_adapter_config, read_config
from service.models.fingerprints import MODEL_FILES, TOKENIZER_FILES, WEIGHT_FILES, relevant_files
from service.models.registry import OPTIMIZER_STATE, registered_folder
from worker.errors import ModelError, OutOfMemory, UnitError

MAX_TEXT_BYTES = 128 * 2**20  # the largest tokenizers have a quarter of it


class HubUnavailable(UnitError):
    """The hub did not deliver the files of the pinned commit."""

    code, retryable = "hub_unavailable", True


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model's files on this machine: the sha256 of each by its name; those of an adapter's base as `base/<name>`."""

    path: Path
    files: dict[str, str]
    signature: tuple[tuple[Any, ...], ...]
    base: "ModelFolder | None" = None

    @property
    def is_adapter(self) -> bool:
        return self.base is not None

    @property
    def is_current(self) -> bool:
        """Whether the files are those that were hashed, by their sizes and times."""
        is_same = self.path.is_dir() and _signature(relevant_files(self.path)) == self.signature
        return is_same and (self.base is None or self.base.is_current)

    @property
    def weights(self) -> list[Path]:
        """The safetensors files of the model, without an optimizer's state."""
        return _weights(relevant_files(self.path))

    @property
    def tokenizer_folder(self) -> "ModelFolder":
        """This one, or an adapter's base where the adapter comes without a tokenizer."""
        return self if self.base is None or "tokenizer.json" in self.files else self.base.tokenizer_folder

    @property
    def fingerprint(self) -> str:
        """The sha256 over the names and hashes of the files that decide what is computed."""
        return _digest(self.files)

    @property
    def tokenizer_fingerprint(self) -> str:
        files = ((name, sha) for name, sha in self.tokenizer_folder.files.items() if "/" not in name)
        return _digest({name: sha for name, sha in files if _matches(Path(name), TOKENIZER_FILES)})


def find(model: Mapping[str, Any], registered: Path, *, weights: bool = True) -> ModelFolder:
    """The folder of a job's resolved model, fetched from the hub if it is not here yet.

    Without `weights` none are looked for, fetched or hashed: enough for the configuration and the tokenizer.

    Raises:
        ModelError: the folder is gone, lacks files, or holds files that cannot be used.
        HubUnavailable: the hub did not answer.
    """
    base = find(model["base"], registered, weights=weights) if "base" in model else None
    path = _registered(registered, model["name"]) if model["kind"] == "registered" else _snapshot(model, weights)
    needed = CONFIG if base is None else ADAPTER_CONFIG
    if not (path / needed).is_file():
        raise ModelError(f"The model {model.get('name') or model.get('id')!r} has no {needed} on this worker.")
    relevant = [p for p in relevant_files(path) if weights or not _matches(p, WEIGHT_FILES)]
    if weights and not _weights(relevant):
        raise ModelError("The model has no safetensors weights; other formats are not loaded.")
    _check(relevant)
    try:
        read_config(path / CONFIG) if base is None else read_adapter_config(path / ADAPTER_CONFIG)
    except UnusableConfig as error:
        raise ModelError(f"The model cannot be used: {error}.") from error
    files = {p.name: _sha256(p) for p in relevant}
    if base is not None:
        files |= {f"base/{name}": sha for name, sha in base.files.items()}
    return ModelFolder(path, files, _signature(relevant), base)


@contextmanager
def blaming_the_model(problem: str) -> Iterator[None]:
    """Turns whatever a library raises on a model's files into a `ModelError`, except a lack of memory."""
    try:
        yield
    except (UnitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise OutOfMemory(f"{problem}: it does not fit in memory.") from error
        raise ModelError(f"{problem}: {error or type(error).__name__}") from error


def _registered(folder: Path, name: str) -> Path:
    try:
        return registered_folder(folder, name)
    except ValueError as error:
        raise ModelError(f"The model {name!r} cannot be used: {error}.") from error


def _snapshot(model: Mapping[str, Any], weights: bool) -> Path:
    patterns = [*MODEL_FILES, *TOKENIZER_FILES]
    others = None if weights else list(WEIGHT_FILES)
    try:
        path = snapshot_download(model["id"], revision=model["commit"], allow_patterns=patterns, ignore_patterns=others)
        return Path(path)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise HubUnavailable(
            f"{model['id']} at {model['commit']} could not be downloaded from the hub: {type(error).__name__}."
        ) from error


def _check(files: Iterable[Path]) -> None:
    """Refuses files too large to be parsed, and those that name weights other than safetensors files beside them.

    transformers follows both an index and `transformers_weights` to other formats, an index to other folders too.
    """
    names = {p.name for p in files}
    for path in files:
        if path.suffix != ".safetensors" and path.stat().st_size > MAX_TEXT_BYTES:
            raise ModelError(f"The model's {path.name} has more than {MAX_TEXT_BYTES:,} bytes.")
        if path.name == "config.json" or path.name.endswith(".index.json"):
            with blaming_the_model("The model's configuration could not be read"):
                content = json.loads(path.read_bytes())
                named = {*content.get("weight_map", {}).values(), *filter(None, [content.get("transformers_weights")])}
            if other := [name for name in named if name not in names or not str(name).endswith(".safetensors")]:
                raise ModelError(
                    f"The model's {path.name} names {other[0]!r}, which is not a safetensors file beside it."
                )


def _weights(files: Iterable[Path]) -> list[Path]:
    return [p for p in files if p.suffix == ".safetensors" and p.name != OPTIMIZER_STATE]


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def _signature(files: Iterable[Path]) -> tuple[tuple[Any, ...], ...]:
    """Changes when one of the files is written or replaced."""
    stats = ((p.name, p.stat()) for p in files)
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(files: Mapping[str, str]) -> str:
    lines = "".join(f"{name} {sha}\n" for name, sha in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
