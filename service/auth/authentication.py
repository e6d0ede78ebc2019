"""Authenticates requests by API key and checks the scope that a route requires."""

import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from typing import Annotated, Any, get_type_hints

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.params import Depends as DependsClass
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from service.auth import repository
from service.auth.principal import Principal, Scope
from service.auth.quotas import limits_of
from service.auth.repository import LIVE_KEY
from service.auth.tables import ApiKey
from service.db.engine import SessionDep, Sessions, run_with_connection
from service.db.reader import Away
from service.http.errors import Forbidden, TooManyRequests, Unauthorized
from service.settings import ApiSettings

log = logging.getLogger(__name__)

KEY_PREFIX = "wnw_"
_KEY = re.compile(rf"{KEY_PREFIX}([0-9a-f]{{12}})_[A-Za-z0-9_-]{{43}}")


def key_digest(secret_key: str, key: str) -> bytes:
    """The HMAC-SHA256 of a key under the server's secret: all that is stored of it."""
    return hmac.new(secret_key.encode(), key.encode(), hashlib.sha256).digest()


def authenticate(session: Session, key: str, secret_key: str) -> Principal:
    """The principal of a key.

    Raises:
        Unauthorized: the key is malformed, unknown, expired or revoked.
    """
    return principal_of(valid_key(session, key, secret_key))


def principal_of(row: ApiKey) -> Principal:
    scopes = frozenset(Scope(scope) for scope in row.scopes)
    return Principal(tenant_id=row.tenant_id, key_id=row.id, scopes=scopes, limits=row.limits)


def valid_key(session: Session, key: str, secret_key: str) -> ApiKey:
    """The row of a valid key. The comparison takes constant time, and the error does not reveal what was wrong."""
    parts = _KEY.fullmatch(key)
    row = repository.live_key(session, parts[1]) if parts is not None else None
    expected = row.digest if row is not None else bytes(32)
    is_ours = hmac.compare_digest(key_digest(secret_key, key), expected)
    if not is_ours or row is None:
        raise unauthorized("The API key is not valid.")
    return row


def live_check(sessions: Sessions, principal: Principal) -> Callable[[], None]:
    """`require_live` in a session of its own."""

    def check() -> None:
        with sessions() as session:
            require_live(session, principal)

    return check


def require_live(session: Session, principal: Principal) -> None:
    """For what goes on after the key was looked at: a stream, a download, an upload, a wait.

    Raises:
        Unauthorized: the key has been revoked, or has expired, since; or the browser has logged out.
    """
    if not repository.is_live(session, principal):
        raise unauthorized("The API key is not valid.")


def unauthorized(why: str) -> Unauthorized:
    return Unauthorized(
        f"{why} Send `Authorization: Bearer wnw_...`; create a key with `winnow keys create`.",
        headers={"WWW-Authenticate": "Bearer"},
    )


def commit_use(session: Session, row: ApiKey) -> None:
    """Commits the key's last use, at most once a minute, even if the request fails. The session must be new."""
    if row.last_used_at is not None and datetime.now(UTC) - row.last_used_at < repository.USE_INTERVAL:
        return
    try:
        repository.record_use(session, row.id)
        session.commit()
    except DBAPIError as error:  # a read-only database must still serve reads
        session.rollback()
        log.warning("the use of key %s was not recorded (%s)", row.id, type(error).__name__)


_bearer = HTTPBearer(auto_error=False, description="An API key: `wnw_...`")


async def admit(request: Request) -> None:
    """Whether the head of a request allows for its body: its key, the key's rate, and the scope that the route needs.

    The request is counted once; its dependencies find the principal here. Takes a connection while the key is looked up.

    Raises:
        Unauthorized: the key is missing or not valid.
        TooManyRequests: the key has sent too many requests.
        Forbidden: the key lacks the route's scope.
    """

    def in_new_session(identify: Callable[[Session], Principal]) -> Principal:
        with request.app.state.sessions() as session:
            return identify(session)

    principal = await _admit(request, lambda identify: run_with_connection(request, partial(in_new_session, identify)))
    request.state.keeps_its_turn = True
    if (allowed := _allowed_at(request.scope["endpoint"])) is not None:
        await allowed(principal)


async def _admit(
    request: Request, with_session: Callable[[Callable[[Session], Principal]], Awaitable[Principal]]
) -> Principal:
    """Sets the tenant for the request's log line, too."""
    if hasattr(request.state, "principal"):
        admitted: Principal = request.state.principal
        return admitted
    settings: ApiSettings = request.app.state.settings
    credentials = await _bearer(request)
    if credentials is None:
        raise unauthorized("The API key is missing.")
    asked = Asked.by(request)
    found = None if asked is None else await _read(request, asked)

    def identify(session: Session) -> Principal:
        row = valid_key(session, credentials.credentials, settings.secret_key.get_secret_value())
        commit_use(session, row)
        return replace(principal_of(row), request_id=request.state.request_id)

    return await accept(request, found or await with_session(identify))


async def accept(request: Request, principal: Principal) -> Principal:
    """Counts the request of a principal who was identified; from now on its dependencies find the principal.

    Raises:
        TooManyRequests: the key has sent too many requests.
    """
    settings: ApiSettings = request.app.state.settings
    request.state.tenant_id = principal.tenant_id
    request.app.state.callers.remember(request, principal.tenant_id)
    await request.app.state.rate.hit(principal.key_id, limits_of(principal, settings.limits).requests_per_minute)
    request.state.principal = principal
    return principal


async def _read(request: Request, asked: "Asked") -> Principal | None:
    """The principal, without a thread or a transaction; None where the usual way must look at the key."""
    try:
        rows = await request.app.state.reader.rows(asked.tenant, LIVE_KEY, {"prefix": asked.prefix})
    except Away:
        return None
    if not rows or not _is_noted(request, asked, rows[0]):
        return None
    row, scopes = rows[0], frozenset(Scope(scope) for scope in rows[0].scopes)
    return Principal(row.tenant_id, row.key_id, scopes, row.limits, request.state.request_id)


def _is_noted(request: Request, asked: "Asked", row: Any) -> bool:
    """Whether the key is the one of the row of `LIVE_KEY`, and its use need not be recorded by this request."""
    settings: ApiSettings = request.app.state.settings
    digest = key_digest(settings.secret_key.get_secret_value(), asked.key)
    return hmac.compare_digest(digest, row.digest) and (row.is_noted or not request.app.state.uses.is_mine(row.key_id))


@dataclass(frozen=True, slots=True)
class Asked:
    """What the head of a request says of its key, for a quick answer."""

    key: str
    prefix: str
    tenant: str
    """As far as earlier requests have shown."""

    @classmethod
    def by(cls, request: Request) -> "Asked | None":
        """None: it has no key, or one that cannot be."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or (parts := _KEY.fullmatch(key)) is None:
            return None
        return cls(key, parts[1], request.app.state.callers.tenant_of(request))


async def admit_at_once(request: Request, asked: Asked, row: Any, scope: Scope) -> bool:
    """Admits a request for which everything else was found, by a row of `repository.LIVE_KEY`; False: the usual way must look at
    it, since it is to be refused, or the key's use to be recorded."""
    state = request.app.state
    if not _is_noted(request, asked, row) or scope not in row.scopes:
        return False
    limits = limits_of(row, state.settings.limits)
    try:
        await state.rate.hit(row.key_id, limits.requests_per_minute)
    except TooManyRequests:
        return False
    request.state.tenant_id = row.tenant_id
    state.callers.remember(request, row.tenant_id)
    return True


async def admitted(
    request: Request,
    session: SessionDep,
    _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    """The dependency of every route that needs a key. Where no body had to be read before, in the request's own session."""
    return await _admit(request, lambda identify: run_in_threadpool(identify, session))


PrincipalDep = Annotated[Principal, Depends(admitted)]


class _Allowed:
    """The dependency of a route that needs the scope."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    async def __call__(self, principal: PrincipalDep) -> Principal:  # async: a thread would cost more than it does
        if self._scope not in principal.scopes:
            has = ", ".join(sorted(principal.scopes)) or "none"
            raise Forbidden(
                f"This requires a key with the scope `{self._scope}`; yours has: {has}."
                f" Create one with `winnow keys create --scope {self._scope}`.",
                code="insufficient_scope",
            )
        return principal


@cache
def _allowed_at(endpoint: Callable[..., Any]) -> _Allowed | None:
    """What the route of this function depends on."""
    hints = get_type_hints(endpoint, include_extras=True).values()
    extras = (extra for hint in hints for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, DependsClass))
    return next((extra.dependency for extra in extras if isinstance(extra.dependency, _Allowed)), None)


ReadDep = Annotated[Principal, Depends(_Allowed(Scope.READ))]
SubmitDep = Annotated[Principal, Depends(_Allowed(Scope.SUBMIT))]
AdminDep = Annotated[Principal, Depends(_Allowed(Scope.ADMIN))]
