"""Who sends a page's request: the cookie of a session, and with what changes something the token of a form of ours.

`/v1` knows no cookie, so that no other site can have a browser call it.
"""

import hmac
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Annotated
from urllib.parse import urlencode

from fastapi import Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import FormData

from service.auth import authentication, browsers
from service.auth.principal import Principal
from service.db.engine import SessionDep
from service.http.bodies import BodyBudget, set_budget
from service.http.errors import Forbidden, Unauthorized
from service.settings import ApiSettings

LOGIN_PATH = "/login"
FORM_TOKEN, FORM_TOKEN_HEADER = "form_token", "x-form-token"
_LOGIN_BYTES = 4_096


_OWN_PATH = re.compile(r"/[A-Za-z][^\\\x00-\x20]*")


def own_path(path: str, otherwise: str) -> str:
    """The path, if it is one of this host; browsers take `//host` and `/\\host` for another's."""
    return path if _OWN_PATH.fullmatch(path) else otherwise


def login_address(request: Request) -> str:
    """Of the login that leads back to the request's page."""
    page = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return f"{LOGIN_PATH}?{urlencode({'next': page})}"


def secret_key(request: Request) -> str:
    settings: ApiSettings = request.app.state.settings
    return settings.secret_key.get_secret_value()


def lifetime(request: Request) -> timedelta:
    settings: ApiSettings = request.app.state.settings
    return timedelta(hours=settings.web.session_hours)


def _cookie_name(request: Request) -> str:
    """Browsers take `__Host-` only over HTTPS, and then from this host alone."""
    return "__Host-winnow" if request.url.scheme == "https" else "winnow"


def set_cookie(request: Request, response: Response, token: str) -> None:
    response.set_cookie(
        _cookie_name(request),
        token,
        max_age=int(lifetime(request).total_seconds()),
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def remove_cookie(request: Request, response: Response) -> None:
    secure = request.url.scheme == "https"
    response.delete_cookie(_cookie_name(request), secure=secure, httponly=True, samesite="strict")


def session_token(request: Request) -> str:
    """What the cookie holds; "": there is none."""
    return request.cookies.get(_cookie_name(request), "")


async def logged_in(request: Request, session: SessionDep) -> Principal:
    """The dependency of every page but the login's; the scopes are checked as in the API, by the dependencies that follow.

    Raises:
        Unauthorized: there is no session, it has ended, or its key is not valid any more.
        TooManyRequests: the key has sent too many requests.
    """
    if not (token := session_token(request)):
        raise Unauthorized("Log in to see this page.")
    found = await run_in_threadpool(browsers.identify, session, token, secret_key(request))
    return await authentication.accept(request, replace(found, request_id=request.state.request_id))


async def admit(request: Request) -> None:
    """Whether the head of a request allows for its body, as in the API; who is logging in has yet to say who it is.

    Raises:
        ApiError: as `authentication.admit`.
    """
    if not (request.method == "POST" and request.url.path == LOGIN_PATH):
        await authentication.admit(request)


def form_token(request: Request) -> str:
    """The token for the forms of the page that is being rendered."""
    return browsers.form_token(session_token(request), secret_key(request))


def require_own_site(request: Request) -> None:
    """
    Raises:
        Forbidden: a browser says that another site's page has sent this.
    """
    site = request.headers.get("sec-fetch-site", "same-origin")
    origin = request.headers.get("origin", "")
    own = f"{request.url.scheme}://{request.headers.get('host', '')}"
    if site not in ("same-origin", "none") or (origin and not hmac.compare_digest(origin.encode(), own.encode())):
        raise Forbidden("This was sent by a page of another site, and nothing was done.", code="foreign_form")


def require_form_token(request: Request, sent: str) -> None:
    """
    Raises:
        Forbidden: the token is not that of the session.
    """
    require_own_site(request)
    if not browsers.is_form_token(sent, session_token(request), secret_key(request)):
        raise Forbidden("This form is of another session, and nothing was done. Reload the page.", code="foreign_form")


async def _form(request: Request) -> AsyncIterator[FormData]:
    """The form of a page that changes something, once its token was checked. Files are not taken."""
    async with request.form(max_files=0, max_fields=500) as form:
        sent = form.get(FORM_TOKEN, request.headers.get(FORM_TOKEN_HEADER, ""))
        require_form_token(request, str(sent))
        yield form


async def _login_form(request: Request) -> AsyncIterator[FormData]:
    requests = request.app.state.settings.requests
    set_budget(request, BodyBudget(_LOGIN_BYTES, requests.grace_seconds, requests.bytes_per_second))
    require_own_site(request)
    async with request.form(max_files=0, max_fields=5) as form:
        yield form


FormDep = Annotated[FormData, Depends(_form)]
LoginFormDep = Annotated[FormData, Depends(_login_form)]
