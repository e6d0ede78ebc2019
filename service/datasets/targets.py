"""`/v1/targets`: the ready-made targets that a job may name."""

from fastapi import APIRouter, Request
from pydantic import Field

from service.auth.authentication import ReadDep
from service.datasets import hub
from service.datasets.presets import PRESETS, Preset
from service.http.errors import Forbidden, Unauthorized, responses
from service.http.pagination import Page
from service.settings import ApiSettings

router = APIRouter(tags=["targets"])


class PresetOut(Preset):
    """A ready-made target."""

    allowed: bool = Field(
        description="Whether this server imports the dataset (WINNOW_DATASETS__HUB); else no job can name it"
    )


class Presets(Page[PresetOut]):
    """All ready-made targets."""


@router.get("/targets", summary="List the ready-made targets", responses=responses(Unauthorized, Forbidden))
def list_targets(request: Request, principal: ReadDep) -> Presets:
    """Examples of what benchmarks measure, none of those that they score by: where each is on the hub, which part of it is
    taken and why, and the template that makes conversations of its rows."""
    del principal  # any key may look
    settings: ApiSettings = request.app.state.settings
    found = [
        PresetOut(**preset.model_dump(), allowed=hub.is_allowed(preset.hub.id, settings.datasets))
        for preset in PRESETS.values()
    ]
    return Presets(data=found, has_more=False, last_id=found[-1].name)
