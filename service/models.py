"""Models a job may name: folders registered by the operator, and Hugging Face Hub repositories at a pinned commit.

A registered model is a folder with a config.json inside the operator's models folder; users know its name, never its path.
"""

import json
import logging
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from pydantic import BaseModel, ConfigDict, Field

from service.errors import Unauthorized, Unavailable, Unprocessable, responses
from service.settings import ApiSettings, ModelSettings
from service.tenants.service import CallerDep

log = logging.getLogger(__name__)

# The families whose gradient hooks, embeddings and masks are covered by tests.
MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox"})

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")

router = APIRouter(tags=["models"])


class HubModel(BaseModel):
    """A model of the Hugging Face Hub. The revision is resolved to a commit when the job is made."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"id": "Qwen/Qwen3-0.6B"}]})

    id: Annotated[str, Field(pattern=f"^{_HUB_ID.pattern}$")]
    revision: Annotated[str, Field(min_length=1, max_length=200)] = "main"


class RegisteredModel(BaseModel):
    name: str = Field(examples=["smollm2-135m-instruct"])
    model_type: str = Field(examples=["llama"])
    blocks: int = Field(description="Transformer blocks", examples=[30])


class RegisteredModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[RegisteredModel]


def registered(settings: ModelSettings) -> list[RegisteredModel]:
    """The registered models by name. A folder whose config.json says nothing of use is passed over, and logged."""
    if not settings.folder.is_dir():
        return []
    names = sorted(p.parent.name for p in settings.folder.glob("*/config.json") if _NAME.fullmatch(p.parent.name))
    found = (_describe(settings, name) for name in names)
    return [model for model in found if model is not None]


def _describe(settings: ModelSettings, name: str) -> RegisteredModel | None:
    path = settings.folder / name / "config.json"
    try:
        config = json.loads(path.read_text())
        blocks = next((config[key] for key in ("num_hidden_layers", "n_layer") if key in config), 0)
        return RegisteredModel(name=name, model_type=str(config.get("model_type", "")), blocks=blocks)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("models: %s cannot be used (%s: %s)", path, type(error).__name__, error)
        return None


def resolve(settings: ModelSettings, model: str | HubModel, *, blocks: int) -> dict[str, Any]:
    """What the job's model is from now on: a registered name, or a hub id at a commit.

    Raises:
        Unprocessable: there is no such model, or it is not one that can be used; `param` is "model".
        Unavailable: the hub cannot be asked.
    """
    if isinstance(model, str) and "/" not in model:
        return _resolve_registered(settings, model, blocks)
    if isinstance(model, str):
        return _resolve_hub(settings, model, "main")
    return _resolve_hub(settings, model.id, model.revision)


def _resolve_registered(settings: ModelSettings, name: str, blocks: int) -> dict[str, Any]:
    found = {m.name: m for m in registered(settings)}
    if name not in found:
        known = ", ".join(found) or "none"
        raise Unprocessable(
            f"No model is registered as {name!r}. Registered: {known}. A hub model is named owner/name.", param="model"
        )
    model = found[name]
    if model.model_type not in MODEL_TYPES:
        raise Unprocessable(
            f"Model {name!r} is of type {model.model_type!r}; supported are {', '.join(sorted(MODEL_TYPES))}.",
            param="model",
        )
    if blocks > model.blocks:
        raise Unprocessable(
            f"embedding.blocks is {blocks}, but model {name!r} has {model.blocks} blocks.", param="embedding.blocks"
        )
    return {"kind": "registered", "name": name}


def _resolve_hub(settings: ModelSettings, hub_id: str, revision: str) -> dict[str, Any]:
    if not settings.hub:
        raise Unprocessable("This server uses registered models only; see GET /v1/models.", param="model")
    if not _HUB_ID.fullmatch(hub_id):
        raise Unprocessable(f"{hub_id!r} is not a hub id (owner/name).", param="model")
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
    if not any(name.endswith(".safetensors") for name in files):
        raise Unprocessable(f"{hub_id!r} has no safetensors weights; other formats are not loaded.", param="model")
    return {"kind": "hub", "id": hub_id, "revision": revision, "commit": info.sha}


@router.get("/models", summary="The registered models", responses=responses(Unauthorized))
def list_models(request: Request, caller: CallerDep) -> RegisteredModels:
    del caller  # any key may look
    settings: ApiSettings = request.app.state.settings
    return RegisteredModels(data=registered(settings.models))
