"""`/v1/keys`: the keys of the caller's own tenant."""

from fastapi import APIRouter, Request, status
from fastapi.responses import JSONResponse

from service.database import SessionDep
from service.errors import Conflict, Forbidden, NotFound, Unauthorized, Unprocessable, responses
from service.idempotency.service import OnceDep
from service.pages import AfterKey, Limit, Page
from service.settings import ApiSettings
from service.tenants import keys
from service.tenants.schemas import KeyObject, KeyRequest, NewKey, shown
from service.tenants.service import KEY_START, AdminDep

router = APIRouter(prefix="/keys", tags=["keys"], responses=responses(Unauthorized, Forbidden))


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    summary="Make an API key",
    response_model=NewKey,
    responses=responses(Conflict, Unprocessable),
)
def create_key(
    body: KeyRequest, request: Request, session: SessionDep, caller: AdminDep, once: OnceDep
) -> JSONResponse:
    """The answer holds the key, which is shown nowhere else: the service keeps only an HMAC of it."""
    settings: ApiSettings = request.app.state.settings
    row, key = keys.create(session, caller, body, settings.limits, settings.secret_key.get_secret_value())
    made = NewKey(**shown(row, KEY_START), key=key)
    return once.keep(made, status.HTTP_201_CREATED, {"Location": f"/v1/keys/{row.id}", "Cache-Control": "no-store"})


@router.get("", summary="Your tenant's keys, newest first", responses=responses(Unprocessable))
def list_keys(session: SessionDep, caller: AdminDep, limit: Limit = 20, after: AfterKey = None) -> Page[KeyObject]:
    """Revoked and expired ones too."""
    found, has_more = keys.page(session, caller.tenant_id, after=after, limit=limit)
    data = [KeyObject(**shown(row, KEY_START)) for row in found]
    return Page(data=data, has_more=has_more, last_id=data[-1].id if data else None)


@router.get("/{key_id}", summary="One key", responses=responses(NotFound))
def get_key(key_id: str, session: SessionDep, caller: AdminDep) -> KeyObject:
    return KeyObject(**shown(keys.find(session, caller.tenant_id, key_id), KEY_START))


@router.delete(
    "/{key_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Revoke a key",
    responses=responses(NotFound, Conflict),
)
def revoke_key(key_id: str, session: SessionDep, caller: AdminDep) -> None:
    """At once and for ever, the key that asks for it too; but not the last one with the scope `admin`. Safe to repeat."""
    keys.revoke(session, caller, key_id)
