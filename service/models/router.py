"""`/v1/models`: the models that the operator has registered."""

from fastapi import APIRouter, Request

from service.auth.authentication import ReadDep
from service.http.errors import Forbidden, Unauthorized, responses
from service.http.pagination import Page
from service.models.registry import RegisteredModel, registered
from service.settings import ApiSettings

router = APIRouter(tags=["models"])


class RegisteredModels(Page[RegisteredModel]):
    """All registered models, sorted by name."""


@router.get("/models", summary="List the registered models", responses=responses(Unauthorized, Forbidden))
def list_models(request: Request, principal: ReadDep) -> RegisteredModels:
    del principal  # any key may look
    settings: ApiSettings = request.app.state.settings
    found = registered(settings.models)
    return RegisteredModels(data=found, has_more=False, last_id=found[-1].name if found else None)
