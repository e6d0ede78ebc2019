"""Models a job may name: folders registered by the operator, and Hugging Face Hub repositories at a pinned commit.

A registered model is a folder inside the operator's models folder, with a config.json, or with the adapter_config.json of a LoRA
adapter (peft) of another model; users know its name, never its path. Beside the weights it may hold the state of its optimiser.
"""

import logging
import os
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from pydantic import BaseModel, ConfigDict, Field

from service.http.errors import Unavailable, Unprocessable
from service.models.configs import ADAPTER_CONFIG, CONFIG, entries, read_adapter_config, read_config
from service.models.fingerprints import sampled_fingerprint
from service.plan.parameters import Parameters
from service.settings import ModelSettings

log = logging.getLogger(__name__)

# The families whose gradient hooks, embeddings and masks are covered by tests.
MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox"})

OPTIMIZER_STATE = "optimizer.safetensors"
SUBMITTED = "submitted_fingerprint"

# The settings of an adapter that describe a plain LoRA or do not affect the computation. Any other setting that is in use
# changes the layers, their weights or the base model in a way that the gradients here do not support.
_PLAIN = {
    *("peft_type", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("peft_version", "megatron_core", "qalora_group_size", "eva_config", "loftq_config", "runtime_config"),
}
_PLAIN_VALUES: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others change the base's weights
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")


class HubModel(BaseModel):
    """A model on the Hugging Face Hub. The revision is resolved to a commit when the job is created."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"id": "Qwen/Qwen3-0.6B"}]})

    id: Annotated[str, Field(pattern=f"^{_HUB_ID.pattern}$")]
    revision: Annotated[str, Field(min_length=1, max_length=200)] = "main"


class RegisteredModel(BaseModel):
    name: str = Field(examples=["smollm2-135m-instruct"])
    model_type: str | None = Field(
        description="null: unknown (a base model on the hub, or a model that cannot be used)", examples=["llama"]
    )
    blocks: int | None = Field(description="Transformer blocks; null: as `model_type`", examples=[30])
    base: str | None = Field(default=None, description="The base model of this LoRA adapter: a name or a hub id")
    optimizer_state: bool = Field(default=False, description="Whether an optimiser state is registered with it")
    problem: str | None = Field(default=None, description="Why jobs cannot use the model; null: they can")


def registered_folder(folder: Path, name: str) -> Path:
    """The folder of the registered model of this name.

    Raises:
        ValueError: the name is a path, or leads out of the models folder; the message is the end of a sentence.
    """
    path = folder / name
    if not _NAME.fullmatch(name):
        raise ValueError("it is not a valid name of a registered model")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("its folder is a link out of the models folder; copy or mount it there")
    return path


def registered(settings: ModelSettings) -> list[RegisteredModel]:
    """The registered models by name; whatever is wrong with one is its `problem`, and hides no other."""
    found = sorted(path.name for path in settings.folder.glob("*") if _NAME.fullmatch(path.name) and _is_model(path))
    return [_describe(settings, name) for name in found]


def _is_model(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (CONFIG, ADAPTER_CONFIG))


def _describe(settings: ModelSettings, name: str) -> RegisteredModel:
    found = RegisteredModel(name=name, model_type=None, blocks=None)
    try:
        folder = registered_folder(settings.folder, name)
        found.optimizer_state = (folder / OPTIMIZER_STATE).is_file()
        if os.path.lexists(folder / ADAPTER_CONFIG):
            config = read_adapter_config(folder / ADAPTER_CONFIG)
            found.base = config.base_model_name_or_path
            found.problem = adapter_problem(entries(config))
            if "/" in found.base:
                if not _HUB_ID.fullmatch(found.base):
                    raise ValueError(_wrong_base(found.base))
                return found
            folder = _base_folder(settings, found.base)
        config_of_base = read_config(folder / CONFIG)
        found.model_type, found.blocks = config_of_base.model_type, config_of_base.num_hidden_layers
        if found.model_type not in MODEL_TYPES:
            raise ValueError(f"its type is {found.model_type!r}; supported are {', '.join(sorted(MODEL_TYPES))}")
    except ValueError as error:
        found.problem = str(error)
    except (OSError, RuntimeError) as error:  # a folder that is a link to itself is a RuntimeError
        found.problem = f"its folder cannot be read ({type(error).__name__})"
    if found.problem is not None:
        log.warning("models: %s cannot be used: %s", name, found.problem)
    return found


def _base_folder(settings: ModelSettings, base: str) -> Path:
    """
    Raises:
        ValueError: it cannot be the base of an adapter; the message is the end of a sentence.
    """
    if not _NAME.fullmatch(base) or not _is_model(settings.folder / base):
        raise ValueError(_wrong_base(base))
    if os.path.lexists(settings.folder / base / ADAPTER_CONFIG):
        raise ValueError(f"its base {base!r} is itself an adapter")
    return registered_folder(settings.folder, base)


def _wrong_base(base: str) -> str:
    return (
        f"its base {base[:100]!r} is neither a registered name nor a hub id: write one of these into base_model_name_or_path of"
        f" its {ADAPTER_CONFIG}"
    )


def adapter_problem(config: Mapping[str, Any]) -> str | None:
    """Why an adapter of this adapter_config.json cannot be used, for the end of a sentence; None where it can."""
    if config.get("peft_type") != "LORA":
        return f"its type is {config.get('peft_type')!r}; only LORA is supported"
    for name, value in config.items():
        if name not in _PLAIN and value and value not in _PLAIN_VALUES.get(name, ()):
            advice = "train a plain LoRA, or register the merged model"
            return f"it sets {name[:100]} to {repr(value)[:100]}, which is not supported; {advice}"
    return None


def resolve(settings: ModelSettings, model: str | HubModel, parameters: Parameters) -> dict[str, Any]:
    """The job's resolved model: `{"kind": "registered", "name"}` or `{"kind": "hub", "id", "revision", "commit"}`.

    An adapter also has its resolved model as `base`; a model registered with an optimiser state, `optimizer_state: true`.

    Raises:
        Unprocessable: there is no such model, or it cannot be used (`param` is "model"); or it does not fit a parameter, which
            `param` then names.
        Unavailable: the hub does not respond.
    """
    if isinstance(model, HubModel):
        resolved = _resolve_hub(settings, model.id, model.revision)
    elif "/" in model:
        resolved = _resolve_hub(settings, model, "main")
    else:
        resolved = _resolve_registered(settings, model, parameters)
    if parameters.optimizer.needs_state and parameters.warmup is None and "optimizer_state" not in resolved:
        raise Unprocessable(
            f"optimizer.type {parameters.optimizer.type} needs an optimizer state, but none is registered with the model: "
            f"request a warmup, or put the state into the folder of a registered model as {OPTIMIZER_STATE}.",
            param="optimizer.type",
        )
    return resolved


def _resolve_registered(settings: ModelSettings, name: str, parameters: Parameters) -> dict[str, Any]:
    if not (_NAME.fullmatch(name) and _is_model(settings.folder / name)):
        known = ", ".join(m.name for m in registered(settings) if m.problem is None) or "none"
        raise Unprocessable(
            f"No model is registered as {name!r}. Registered: {known}. A hub model is named owner/name.", param="model"
        )
    model = _describe(settings, name)
    if model.problem is not None:
        raise Unprocessable(f"The model {name!r} cannot be used: {model.problem}.", param="model")
    blocks = parameters.embedding.blocks
    embeds_blocks = parameters.method == "influence_distillation" and parameters.embedding.kind not in ("rds", "text")
    if embeds_blocks and model.blocks is not None and blocks > model.blocks:
        raise Unprocessable(
            f"embedding.blocks is {blocks}, but model {name!r} has {model.blocks} blocks.", param="embedding.blocks"
        )
    resolved: dict[str, Any] = {"kind": "registered", "name": name}
    if model.base is not None:
        resolved["base"] = _resolve_base(settings, name, model.base, parameters)
    return resolved | ({"optimizer_state": True} if model.optimizer_state else {})


def with_fingerprints(settings: ModelSettings, model: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved model with what its files, and those of an adapter's base, are now: workers compute with no others.

    Raises:
        Unprocessable: they cannot be read.
    """
    made = dict(model)
    if "base" in made:
        made["base"] = with_fingerprints(settings, made["base"])
    if made["kind"] == "registered":
        try:
            fingerprint = sampled_fingerprint(settings.folder / made["name"])
        except OSError as error:
            raise Unprocessable(
                f"The files of the model {made['name']!r} cannot be read ({error.strerror}).", param="model"
            ) from error
        made.pop(SUBMITTED, None)
        if fingerprint is not None:
            made[SUBMITTED] = fingerprint
    return made


def _resolve_base(settings: ModelSettings, name: str, base: str, parameters: Parameters) -> dict[str, Any]:
    if parameters.warmup is not None and parameters.warmup.lora is not None:
        raise Unprocessable(
            f"{name!r} is already an adapter: omit warmup.lora, and the adapter itself is trained.", param="warmup.lora"
        )
    if "/" not in base:
        return {"kind": "registered", "name": base}
    revision = read_adapter_config(settings.folder / name / ADAPTER_CONFIG).revision
    return _resolve_hub(settings, base, revision or "main")


def _resolve_hub(settings: ModelSettings, hub_id: str, revision: str) -> dict[str, Any]:
    if not _HUB_ID.fullmatch(hub_id):
        raise Unprocessable(f"{hub_id!r} is not a hub id (owner/name).", param="model")
    if not any(fnmatchcase(hub_id, pattern) for pattern in settings.hub):
        allowed = "some models of the hub, but not this one" if settings.hub else "none of the hub"
        raise Unprocessable(
            f"{hub_id!r} is not allowed: this server accepts registered models (GET /v1/models) and {allowed}. Its operator can"
            " allow it with the setting WINNOW_MODELS__HUB.",
            param="model",
        )
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise Unprocessable(
            f"{revision!r} is not a valid revision: use a branch, a tag, refs/pr/N or a commit.", param="model.revision"
        )
    try:
        info = HfApi().model_info(hub_id, revision=revision, timeout=10)
    except HFValidationError as error:
        raise Unprocessable(f"{hub_id!r} is not a hub id (owner/name).", param="model") from error
    except RepositoryNotFoundError as error:  # gated ones are of this class
        raise Unprocessable(f"The hub has no model {hub_id!r} that this server can access.", param="model") from error
    except RevisionNotFoundError as error:
        raise Unprocessable(f"{hub_id!r} has no revision {revision!r}.", param="model.revision") from error
    except Exception as error:  # of the HTTP client, which is another one from version to version; or no JSON
        raise Unavailable(
            f"The model hub is not available ({type(error).__name__}); retry, or use a registered model.",
            param="model",
        ) from error
    files = [sibling.rfilename for sibling in info.siblings or []]
    if ADAPTER_CONFIG in files:
        raise Unprocessable(
            f"{hub_id!r} is an adapter: download and register it; its base may be a hub model.", param="model"
        )
    if not any(name.endswith(".safetensors") for name in files):
        raise Unprocessable(f"{hub_id!r} has no safetensors weights; other formats are not loaded.", param="model")
    return {"kind": "hub", "id": hub_id, "revision": revision, "commit": info.sha}
