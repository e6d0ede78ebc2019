"""`/v1/targets`: the ready-made targets that a job may name."""

from fastapi import APIRouter

from service.auth.authentication import ReadDep
from service.datasets.presets import PRESETS, Preset
from service.http.errors import Forbidden, Unauthorized, responses
from service.http.pagination import Page

router = APIRouter(tags=["targets"])


class Presets(Page[Preset]):
    """All ready-made targets."""


@router.get("/targets", summary="List the ready-made targets", responses=responses(Unauthorized, Forbidden))
def list_targets(principal: ReadDep) -> Presets:
    """Examples of what benchmarks measure, none of those that they score by: where each is on the hub, which part of it is
    taken and why, and the template that makes conversations of its rows."""
    del principal  # any key may look
    found = list(PRESETS.values())
    return Presets(data=found, has_more=False, last_id=found[-1].name)
