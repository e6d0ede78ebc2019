"""`/v1/keys`: the keys of the principal's own tenant."""

from fastapi import APIRouter, Request, status
from fastapi.responses import JSONResponse

from service.auth.authentication import AdminDep
from service.db.engine import SessionDep
from service.http.errors import Conflict, Forbidden, NotFound, Unauthorized, Unprocessable, responses
from service.http.pagination import AfterKey, Limit, Page
from service.idempotency.service import IdempotentDep
from service.keys import repository, service
from service.keys.schemas import KeyOut, KeyRequest, NewKey, shown
from service.settings import ApiSettings

router = APIRouter(prefix="/keys", tags=["keys"], responses=responses(Unauthorized, Forbidden))


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    summary="Create an API key",
    response_model=NewKey,
    responses=responses(Conflict, Unprocessable),
)
def create_key(
    body: KeyRequest, request: Request, session: SessionDep, principal: AdminDep, idempotent: IdempotentDep
) -> JSONResponse:
    """The response contains the key, which is shown only once: the service stores only an HMAC of it."""
    settings: ApiSettings = request.app.state.settings
    row, key = service.create(session, principal, body, settings.limits, settings.secret_key.get_secret_value())
    made = NewKey(**shown(row), key=key)
    return idempotent.keep(
        session, made, status.HTTP_201_CREATED, {"Location": f"/v1/keys/{row.id}", "Cache-Control": "no-store"}
    )


@router.get("", summary="List your tenant's keys, newest first", responses=responses(Unprocessable))
def list_keys(session: SessionDep, principal: AdminDep, limit: Limit = 20, after: AfterKey = None) -> Page[KeyOut]:
    """Includes revoked and expired keys."""
    found, has_more = repository.page(session, principal.tenant_id, after=after, limit=limit)
    return Page.of([KeyOut(**shown(row)) for row in found], has_more)


@router.get("/{key_id}", summary="One key", responses=responses(NotFound))
def get_key(key_id: str, session: SessionDep, principal: AdminDep) -> KeyOut:
    return KeyOut(**shown(service.find(session, principal.tenant_id, key_id)))


@router.delete(
    "/{key_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    summary="Revoke a key",
    responses=responses(NotFound, Conflict),
)
def revoke_key(key_id: str, session: SessionDep, principal: AdminDep) -> None:
    """Immediate and permanent. A key can revoke itself, except the last one with the scope `admin`. Safe to repeat."""
    service.revoke(session, principal, key_id)
