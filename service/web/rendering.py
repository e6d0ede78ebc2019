"""Pages of templates. Whatever a user wrote is escaped, since every template is."""

from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from service.auth.principal import Principal, Scope
from service.http.errors import ApiError, Unauthorized
from service.web import admission, formats, static_files

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
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
)

environment = Environment(
    loader=PackageLoader("service.web"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.globals["static"] = static_files.address
environment.filters.update(formats.FILTERS)


def render(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page, or a part of one, of a template and its values."""
    principal: Principal | None = getattr(request.state, "principal", None)
    scopes = frozenset() if principal is None else principal.scopes
    content = environment.get_template(template).render(
        path=request.url.path,
        scopes=scopes,
        navigation=[entry for entry in NAVIGATION if entry.scope in scopes],
        form_token="" if principal is None else admission.form_token(request),
        **values,
    )
    return HTMLResponse(content, status_code=status, headers=HEADERS)


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
    page = render(request, "error.html", status=error.status, error=error, request_id=request.state.request_id)
    page.headers.update(kept)
    return page
