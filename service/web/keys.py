"""`/keys`: the tenant's keys, for admins: listed, created, revoked."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session

from service.auth.authentication import AdminDep
from service.auth.principal import Principal, Scope
from service.db.engine import SessionDep
from service.http.errors import ApiError
from service.http.pagination import AfterKey
from service.keys import repository, service
from service.keys.schemas import KeyLimits, KeyOut, KeyRequest, shown
from service.settings import ApiSettings
from service.web.admission import FormDep, logged_in
from service.web.rendering import render, see_other

router = APIRouter(include_in_schema=False, dependencies=[Depends(logged_in)])

_ENTRIES = 100
_DEFAULTS: Mapping[str, Any] = {"name": "", "scopes": [Scope.READ, Scope.SUBMIT], "expires_in_days": "", "limits": {}}


@router.get("/keys")
def keys_page(request: Request, session: SessionDep, principal: AdminDep, after: AfterKey = None) -> Response:
    return _page(request, session, principal, after=after)


@router.post("/keys")
def create_key(request: Request, session: SessionDep, principal: AdminDep, form: FormDep) -> Response:
    """The page that answers is the one place where the key is shown."""
    limits = {name: form.get(f"limits.{name}", "") for name in KeyLimits.model_fields}
    asked = {
        "name": str(form.get("name", "")),
        "scopes": [str(scope) for scope in form.getlist("scopes")],
        "expires_in_days": form.get("expires_in_days", ""),
        "limits": limits,
    }
    given = {**asked, "limits": _filled(limits)}
    settings: ApiSettings = request.app.state.settings
    try:
        wanted = KeyRequest.model_validate(_filled(given))
        row, key = service.create(session, principal, wanted, settings.limits, settings.secret_key.get_secret_value())
    except ValidationError as error:
        errors = {_field(*each["loc"]): each["msg"] for each in error.errors()}
        return _page(request, session, principal, status=422, form=asked, errors=errors)
    except ApiError as error:
        errors = {error.param or "name": error.detail}
        return _page(request, session, principal, status=error.status, form=asked, errors=errors)
    session.flush()
    return _page(request, session, principal, status=201, created=row.name, key=key)


@router.post("/keys/{key_id}/revoke")
def revoke_key(key_id: str, session: SessionDep, principal: AdminDep, form: FormDep) -> Response:  # noqa: ARG001  # its token is checked
    service.revoke(session, principal, key_id)
    return see_other("/keys")


def _field(name: str | int, *below: str | int) -> str:
    """The field of the form that an error is shown at."""
    return f"limits.{below[0]}" if name == "limits" and below else str(name)


def _filled(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What was left empty is left out."""
    return {name: value for name, value in fields.items() if value != ""}


def _page(
    request: Request,
    session: Session,
    principal: Principal,
    *,
    status: int = 200,
    after: str | None = None,
    form: Mapping[str, Any] = _DEFAULTS,
    errors: Mapping[str, str] | None = None,
    created: str | None = None,
    key: str | None = None,
) -> Response:
    found, has_more = repository.page(session, principal.tenant_id, after=after, limit=_ENTRIES)
    return render(
        request,
        "keys.html",
        status_code=status,
        keys=[KeyOut(**shown(row)) for row in found],
        has_more=has_more,
        own=principal.key_id,
        offered=sorted(principal.scopes),
        limits=list(KeyLimits.model_fields),
        form=form,
        errors=errors or {},
        created=created,
        key=key,
    )
