"""Models a job may name: folders registered by the operator, and Hugging Face Hub repositories at a pinned commit.

A registered model is a folder inside the operator's models folder, with a config.json, or with the adapter_config.json of a LoRA
adapter (peft) of another model; users know its name, never its path. Beside the weights it may hold the state of its optimiser.
"""

import json
import logging
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from pydantic import BaseModel, ConfigDict, Field

from service.errors import Forbidden, Unauthorized, Unavailable, Unprocessable, responses
from service.jobs.parameters import Parameters
from service.pages import Page
from service.settings import ApiSettings, ModelSettings
from service.tenants.service import ReadDep

log = logging.getLogger(__name__)

# The families whose gradient hooks, embeddings and masks are covered by tests.
MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox"})

ADAPTER_CONFIG = "adapter_config.json"
OPTIMIZER_STATE = "optimizer.safetensors"

# Of an adapter's configuration: what describes a plain LoRA, and what has no part in what is computed. Any other setting
# that is in use changes the layers, their weights or the base model in a way that the gradients here do not know.
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
_MOST_CONFIG_BYTES = 2**24

router = APIRouter(tags=["models"])


class HubModel(BaseModel):
    """A model of the Hugging Face Hub. The revision is resolved to a commit when the job is made."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"id": "Qwen/Qwen3-0.6B"}]})

    id: Annotated[str, Field(pattern=f"^{_HUB_ID.pattern}$")]
    revision: Annotated[str, Field(min_length=1, max_length=200)] = "main"


class RegisteredModel(BaseModel):
    name: str = Field(examples=["smollm2-135m-instruct"])
    model_type: str | None = Field(description="null: of a base model on the hub", examples=["llama"])
    blocks: int | None = Field(description="Transformer blocks; null: of a base model on the hub", examples=[30])
    base: str | None = Field(
        default=None, description="The model that this one is a LoRA adapter of: a name or a hub id"
    )
    optimizer_state: bool = Field(default=False, description="Whether the state of its optimiser is registered with it")


class RegisteredModels(Page[RegisteredModel]):
    """All of them, by name."""


def registered_folder(folder: Path, name: str) -> Path:
    """The folder of the registered model of this name.

    Raises:
        ValueError: it is no name but a path, or leads out of the models folder; the end of a sentence.
    """
    path = folder / name
    if not _NAME.fullmatch(name):
        raise ValueError("it is not the name of a registered model")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("its folder is a link that leads out of the models folder; copy or mount it there")
    return path


def registered(settings: ModelSettings) -> list[RegisteredModel]:
    """The registered models by name. A folder whose configuration says nothing of use is passed over, and logged."""
    if not settings.folder.is_dir():
        return []
    files = (p for name in ("config.json", ADAPTER_CONFIG) for p in settings.folder.glob(f"*/{name}"))
    names = sorted({p.parent.name for p in files if _NAME.fullmatch(p.parent.name)})
    found = (_describe(settings, name) for name in names)
    return [model for model in found if model is not None]


def _describe(settings: ModelSettings, name: str) -> RegisteredModel | None:
    base: str | None = None
    try:
        folder = registered_folder(settings.folder, name)
        has_state = (folder / OPTIMIZER_STATE).is_file()
        if (folder / ADAPTER_CONFIG).is_file():
            base = str(_read(folder / ADAPTER_CONFIG)["base_model_name_or_path"])
            if "/" in base:
                return RegisteredModel(name=name, model_type=None, blocks=None, base=base, optimizer_state=has_state)
            folder = registered_folder(settings.folder, base)
        config = _read(folder / "config.json")
        blocks = int(next((config[key] for key in ("num_hidden_layers", "n_layer") if key in config), 0))
        kind = str(config.get("model_type", ""))
        return RegisteredModel(name=name, model_type=kind, blocks=blocks, base=base, optimizer_state=has_state)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        log.warning("models: %s cannot be used (%s: %s)", name, type(error).__name__, error)
        return None


def _read(path: Path) -> Any:
    """A configuration; one that is too large to be one is not parsed."""
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise ValueError(f"{path.name} has more than {_MOST_CONFIG_BYTES:,} bytes")
    return json.loads(path.read_text())


def adapter_problem(config: Mapping[str, Any]) -> str | None:
    """Why an adapter of this adapter_config.json cannot be used, for the end of a sentence; None where it can."""
    if config.get("peft_type") != "LORA":
        return f"it is of the type {config.get('peft_type')!r}; only LORA is supported"
    for name, value in config.items():
        if name not in _PLAIN and value and value not in _PLAIN_VALUES.get(name, ()):
            return (
                f"it sets {name} to {value!r}, which is not supported; train a plain LoRA, or register the merged model"
            )
    return None


def resolve(settings: ModelSettings, model: str | HubModel, parameters: Parameters) -> dict[str, Any]:
    """What the job's model is from now on: `{"kind": "registered", "name"}` or `{"kind": "hub", "id", "revision", "commit"}`.

    An adapter has its resolved model as `base`; a model that is registered with its optimiser's state, `optimizer_state: true`.

    Raises:
        Unprocessable: there is no such model, or it is not one that can be used; `param` is "model". Or it does not fit the
            parameters, whose name is then `param`.
        Unavailable: the hub cannot be asked.
    """
    if isinstance(model, str) and "/" not in model:
        resolved = _resolve_registered(settings, model, parameters)
    elif isinstance(model, str):
        resolved = _resolve_hub(settings, model, "main")
    else:
        resolved = _resolve_hub(settings, model.id, model.revision)
    if parameters.optimizer.needs_state and parameters.warmup is None and "optimizer_state" not in resolved:
        raise Unprocessable(
            f"optimizer.type {parameters.optimizer.type} needs the optimizer's state, and none is registered with the model: "
            f"ask for a warmup, or put the state as {OPTIMIZER_STATE} into a registered model's folder.",
            param="optimizer.type",
        )
    return resolved


def _resolve_registered(settings: ModelSettings, name: str, parameters: Parameters) -> dict[str, Any]:
    found = {m.name: m for m in registered(settings)}
    if name not in found and _NAME.fullmatch(name) and (settings.folder / name / ADAPTER_CONFIG).is_file():
        raise Unprocessable(
            f"The adapter {name!r} cannot be used: base_model_name_or_path of its {ADAPTER_CONFIG} must be the name of a"
            " registered model or a hub id.",
            param="model",
        )
    if name not in found:
        known = ", ".join(found) or "none"
        raise Unprocessable(
            f"No model is registered as {name!r}. Registered: {known}. A hub model is named owner/name.", param="model"
        )
    model = found[name]
    if model.model_type is not None and model.model_type not in MODEL_TYPES:
        raise Unprocessable(
            f"Model {name!r} is of type {model.model_type!r}; supported are {', '.join(sorted(MODEL_TYPES))}.",
            param="model",
        )
    blocks = parameters.embedding.blocks
    embeds_blocks = parameters.method == "influence_distillation" and parameters.embedding.kind != "rds"
    if embeds_blocks and model.blocks is not None and blocks > model.blocks:
        raise Unprocessable(
            f"embedding.blocks is {blocks}, but model {name!r} has {model.blocks} blocks.", param="embedding.blocks"
        )
    resolved: dict[str, Any] = {"kind": "registered", "name": name}
    if model.base is not None:
        resolved["base"] = _resolve_base(settings, name, parameters)
    return resolved | ({"optimizer_state": True} if model.optimizer_state else {})


def _resolve_base(settings: ModelSettings, name: str, parameters: Parameters) -> dict[str, Any]:
    config = _read(settings.folder / name / ADAPTER_CONFIG)
    base = config["base_model_name_or_path"]
    if problem := adapter_problem(config):
        raise Unprocessable(f"The adapter {name!r} cannot be used: {problem}.", param="model")
    if parameters.warmup is not None and parameters.warmup.lora is not None:
        raise Unprocessable(
            f"{name!r} is an adapter already: without warmup.lora, it is what is trained.", param="warmup.lora"
        )
    if "/" in base:
        if not _HUB_ID.fullmatch(base):
            raise Unprocessable(
                f"The base of the adapter {name!r} is {base!r}, neither a registered name nor a hub id: write one of them into"
                f" base_model_name_or_path of its {ADAPTER_CONFIG}.",
                param="model",
            )
        return _resolve_hub(settings, base, config.get("revision") or "main")
    if (settings.folder / base / ADAPTER_CONFIG).is_file():
        raise Unprocessable(f"The base {base!r} of the adapter {name!r} is an adapter itself.", param="model")
    return {"kind": "registered", "name": base}


def _resolve_hub(settings: ModelSettings, hub_id: str, revision: str) -> dict[str, Any]:
    if not _HUB_ID.fullmatch(hub_id):
        raise Unprocessable(f"{hub_id!r} is not a hub id (owner/name).", param="model")
    if not any(fnmatchcase(hub_id, pattern) for pattern in settings.hub):
        allowed = "some models of the hub, of which this is none" if settings.hub else "none of the hub"
        raise Unprocessable(
            f"{hub_id!r} is not allowed: this server takes registered models (GET /v1/models) and {allowed}. Its operator may"
            " allow it by the setting WINNOW_MODELS__HUB.",
            param="model",
        )
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise Unprocessable(
            f"{revision!r} is no revision: a branch, a tag, refs/pr/N or a commit.", param="model.revision"
        )
    try:
        info = HfApi().model_info(hub_id, revision=revision, timeout=10)
    except HFValidationError as error:
        raise Unprocessable(f"{hub_id!r} is not a hub id (owner/name).", param="model") from error
    except RepositoryNotFoundError as error:  # gated ones are of this class
        raise Unprocessable(f"The hub has no model {hub_id!r} that this server may read.", param="model") from error
    except RevisionNotFoundError as error:
        raise Unprocessable(f"{hub_id!r} has no revision {revision!r}.", param="model.revision") from error
    except Exception as error:  # of the HTTP client, which is another one from version to version; or no JSON
        raise Unavailable(
            f"The model hub did not answer ({type(error).__name__}); try again, or use a registered model.",
            param="model",
        ) from error
    files = [sibling.rfilename for sibling in info.siblings or []]
    if ADAPTER_CONFIG in files:
        raise Unprocessable(
            f"{hub_id!r} is an adapter: download and register it; its base may be of the hub.", param="model"
        )
    if not any(name.endswith(".safetensors") for name in files):
        raise Unprocessable(f"{hub_id!r} has no safetensors weights; other formats are not loaded.", param="model")
    return {"kind": "hub", "id": hub_id, "revision": revision, "commit": info.sha}


@router.get("/models", summary="The registered models", responses=responses(Unauthorized, Forbidden))
def list_models(request: Request, caller: ReadDep) -> RegisteredModels:
    del caller  # any key may look
    settings: ApiSettings = request.app.state.settings
    found = registered(settings.models)
    return RegisteredModels(data=found, has_more=False, last_id=found[-1].name if found else None)
