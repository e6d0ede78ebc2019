"""Finding, checking and loading a job's model: registered folders and hub snapshots; safetensors only, never remote code."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from service.models import ADAPTER_CONFIG, MODEL_TYPES, OPTIMIZER_STATE, registered_folder
from worker import adapters, placement
from worker.errors import ModelError, OutOfMemory, ParameterError, UnitError
from worker.influence.models import linear_layers

log = logging.getLogger(__name__)

# The files that decide what is computed; a folder's other files (readme, pickled weights) are never read.
_PATTERNS = ("config.json", ADAPTER_CONFIG, "generation_config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template*",
    "added_tokens.json",
)


_MOST_TEXT_BYTES = 128 * 2**20  # the largest tokenizers have a quarter of it
_MOST_BLOCKS = 1_000


class HubUnavailable(UnitError):
    """The hub did not deliver the files of the pinned commit."""

    code, retryable = "hub_unavailable", True


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model's files on this machine, the sha256 of each by name; those of an adapter's base as `base/<name>`.

    `fingerprint` is the sha256 over the names and hashes of the files that count.
    """

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
        is_same = self.path.is_dir() and _signature(_files_that_count(self.path)) == self.signature
        return is_same and (self.base is None or self.base.is_current)

    @property
    def tokenizer_folder(self) -> "ModelFolder":
        """This one, or an adapter's base where the adapter comes without a tokenizer."""
        return self if self.base is None or "tokenizer.json" in self.files else self.base.tokenizer_folder

    @property
    def fingerprint(self) -> str:
        return _digest(self.files)

    @property
    def tokenizer_fingerprint(self) -> str:
        files = ((name, sha) for name, sha in self.tokenizer_folder.files.items() if "/" not in name)
        return _digest({name: sha for name, sha in files if _matches(Path(name), _TOKENIZER_PATTERNS)})


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
    base = find(model["base"], registered) if "base" in model else None
    path = _registered(registered, model["name"]) if model["kind"] == "registered" else _snapshot(model)
    needed = "config.json" if base is None else ADAPTER_CONFIG
    if not (path / needed).is_file():
        raise ModelError(f"The model {model.get('name') or model.get('id')!r} has no {needed} on this worker.")
    wanted = _files_that_count(path)
    if not _weights(wanted):
        raise ModelError("The model has no safetensors weights; other formats are not loaded.")
    _check(wanted)
    files = {p.name: _file_sha256(p) for p in wanted}
    if base is not None:
        files |= {f"base/{name}": sha for name, sha in base.files.items()}
    return ModelFolder(path, files, _signature(wanted), base)


def _registered(folder: Path, name: str) -> Path:
    try:
        return registered_folder(folder, name)
    except ValueError as error:
        raise ModelError(f"The model {name!r} cannot be used: {error}.") from error


def _check(files: Iterable[Path]) -> None:
    """Of the files themselves: none is too large to be parsed, and none names weights that are no safetensors beside it.

    transformers follows both an index and `transformers_weights` to other formats, an index to other folders too.
    """
    names = {p.name for p in files}
    for path in files:
        if path.suffix != ".safetensors" and path.stat().st_size > _MOST_TEXT_BYTES:
            raise ModelError(f"The model's {path.name} has more than {_MOST_TEXT_BYTES:,} bytes.")
        if path.name == "config.json" or path.name.endswith(".index.json"):
            with _loading("The model's configuration could not be read"):
                content = json.loads(path.read_bytes())
                named = {*content.get("weight_map", {}).values(), *filter(None, [content.get("transformers_weights")])}
            if other := [name for name in named if name not in names or not str(name).endswith(".safetensors")]:
                raise ModelError(f"The model's {path.name} names {other[0]!r}, which is no safetensors file beside it.")


@contextmanager
def _loading(problem: str) -> Iterator[None]:
    """Whatever the files of a model make a library raise is the model's fault; not so the want of memory."""
    try:
        yield
    except (UnitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise OutOfMemory(f"{problem}: it does not fit the memory.") from error
        raise ModelError(f"{problem}: {error or type(error).__name__}") from error


def _weights(files: Iterable[Path]) -> list[Path]:
    return [p for p in files if p.suffix == ".safetensors" and p.name != OPTIMIZER_STATE]


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
    with _loading("The model's tokenizer could not be loaded"):
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
    with _loading("The model's configuration could not be read"):
        config = AutoConfig.from_pretrained(
            (folder.base or folder).path, trust_remote_code=False, local_files_only=True
        )
    if config.model_type not in MODEL_TYPES:
        raise ModelError(
            f"Models of type {config.model_type!r} are not supported; {', '.join(sorted(MODEL_TYPES))} are."
        )
    if not 0 < config.num_hidden_layers <= _MOST_BLOCKS:
        raise ModelError(f"The model has {config.num_hidden_layers} blocks; 1 to {_MOST_BLOCKS} are supported.")
    return config


def load_model(
    folder: ModelFolder, dtype: torch.dtype, device: torch.device, quantization: str = "none"
) -> PreTrainedModel:
    """The causal language model in evaluation mode, its adapter in it where it is one.

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
            "The model's weights do not fit the device: use dtype bfloat16, or quantization int8 or nf4."
        ) from error
    model.eval()
    return model


def _load_base(folder: ModelFolder, dtype: torch.dtype, device: torch.device, quantization: str) -> PreTrainedModel:
    config, free = placement.quantised(quantization, dtype), placement.free_memory(device)
    where: dict[str, Any] = {}
    with _loading("The model could not be loaded"):
        if len(free) > 1:
            needed = placement.weight_bytes(_weights(_files_that_count(folder.path)), dtype, quantization)
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
        raise ModelError(f"The model lacks {len(missing)} of its weights, {missing[0]} among them.")
    if config is not None:
        placement.check_derivative(model)
    if not where:
        model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its signature
    return model


def check_optimizer_state(folder: ModelFolder, modules: str, optimizer: Mapping[str, Any]) -> None:
    """Checks the registered state of the layers that influence is measured on, by the headers alone (METHOD 7).

    `modules` is `gradient.modules`, of which an adapter's are independent; `optimizer` the job's.

    Raises:
        ParameterError: there is no state, it is of another optimizer, or it lacks a parameter or has it in another shape;
            names it.
        ValueError: `modules` matches no layer.
    """
    path = folder.path / OPTIMIZER_STATE
    if not path.is_file():
        raise ParameterError(
            f"optimizer.type {optimizer['type']} needs a warmup, or {OPTIMIZER_STATE} beside the model."
        )
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ParameterError(f"The model's {OPTIMIZER_STATE} is no safetensors file: {error}") from error
    if optimizer["type"] == "sgd" and (adam := next((name for name in shapes if name.startswith("second.")), None)):
        # Its first moment is a mean, the momentum of SGD a sum: ten times as large, at the usual decay.
        raise ParameterError(
            f"The model's {OPTIMIZER_STATE} is that of Adam (it has {adam}), not of sgd with momentum: use optimizer.type adam"
            " or adamw, or leave optimizer.momentum out."
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
                    f"The model's {OPTIMIZER_STATE} must have {name} of shape {wanted}, and has it {found}: write it with"
                    " worker.influence.save_state from the training of this model, or ask for a warmup."
                )


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
