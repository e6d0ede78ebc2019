"""Pages of templates. Whatever a user wrote is escaped, since every template is."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from service.auth.principal import Principal, Scope
from service.http import etags
from service.http.errors import ApiError, Unauthorized
from service.web import admission, formats, static_files

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",  # with none at all browsers send forms of ours with the origin `null`
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",  # who goes back after a logout finds nothing
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One of the navigation; `scope`: which keys it is for."""

    title: str
    path: str
    scope: Scope = Scope.READ


NAVIGATION = (
    Entry("Jobs", "/jobs"),
    Entry("New job", "/jobs/new", Scope.SUBMIT),
    Entry("Datasets", "/datasets"),
    Entry("Usage", "/usage"),
    Entry("Keys", "/keys", Scope.ADMIN),
    Entry("Workers", "/workers", Scope.ADMIN),
)

environment = Environment(
    loader=PackageLoader("service.web"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.globals["static"] = static_files.address
environment.globals["now"] = lambda: datetime.now(UTC)
environment.filters.update(formats.FILTERS)


def render(request: Request, template: str, *, status_code: int = 200, **values: Any) -> HTMLResponse:
    """A page of a template and its values."""
    return HTMLResponse(_written(request, template, values), status_code=status_code, headers=HEADERS)


def render_part(request: Request, template: str, *, is_final: bool = False, **values: Any) -> Response:
    """A part of an open page, with the tag of its content: 304 for a browser that has it. `is_final`: it stays as it is."""
    content = _written(request, template, values).encode()
    tag = etags.of_content(content)
    known = etags.not_modified(request, tag)
    more = {"X-Final": "true"} if is_final else {}
    if known is not None:
        known.headers.update(more)
        return known
    return HTMLResponse(content, headers={**HEADERS, "ETag": tag, **more})


def _written(request: Request, template: str, values: Mapping[str, Any]) -> str:
    principal: Principal | None = getattr(request.state, "principal", None)
    scopes = frozenset() if principal is None else principal.scopes
    return environment.get_template(template).render(
        path=request.url.path,
        scopes=scopes,
        navigation=[entry for entry in NAVIGATION if entry.scope in scopes],
        form_token="" if principal is None else admission.form_token(request),
        **values,
    )


def address(path: str, **query: str | None) -> str:
    """With what there is of the query."""
    given = urlencode({name: value for name, value in query.items() if value})
    return f"{path}?{given}" if given else path


def see_other(path: str) -> RedirectResponse:
    """After a change: the browser gets the page at the path."""
    return RedirectResponse(path, status_code=303, headers={"Cache-Control": "no-store"})


def error_page(request: Request, error: ApiError) -> Response | None:
    """What a person sees of an error: the login where that helps, otherwise a page. None for programs: whoever calls `/v1`, and
    scripts of pages, which do not ask for HTML."""
    if request.url.path.startswith("/v1/") or "text/html" not in request.headers.get("accept", ""):
        return None
    if isinstance(error, Unauthorized) and request.method == "GET" and request.url.path != admission.LOGIN_PATH:
        return see_other(admission.login_address(request))
    kept = {name: value for name, value in error.headers.items() if name.lower() in ("retry-after", "allow")}
    page = render(request, "error.html", status_code=error.status, error=error, request_id=request.state.request_id)
    page.headers.update(kept)
    return page
