"""Errors as the client sees them: RFC 9457 problem details (application/problem+json) with a stable `code`.

Raise a subclass of `ApiError` anywhere below a router; the handlers turn it, validation errors and everything unforeseen
into the same shape: {type, title, status, code, detail, param?, errors?, request_id}.
"""

import errno
import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, Field
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from service.database import Busy, is_away
from service.observability import logs

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"


class ApiError(Exception):
    """An error with a place in the API. `param` names the field, parameter or line at fault; `detail` says what to do.

    `retry`: whether the same request may succeed later, by default where the status says so (429, 5xx). Clients like OpenAI's
    try every 409 again unless `x-should-retry` says no.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"

    def __init__(
        self,
        detail: str,
        *,
        param: str | None = None,
        errors: Sequence[Mapping[str, Any]] | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        retry: bool | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.param = param
        self.errors = errors
        self.problem_code = code or self.code
        self.retry = self.status >= 500 or self.status == 429 if retry is None else retry
        self.headers = {"x-should-retry": str(self.retry).lower(), **(headers or {})}


class BadRequest(ApiError):
    status, code, title = 400, "bad_request", "Bad request"


class Unauthorized(ApiError):
    status, code, title = 401, "unauthorized", "Unauthorized"


class Forbidden(ApiError):
    status, code, title = 403, "forbidden", "Forbidden"


class NotFound(ApiError):
    status, code, title = 404, "not_found", "Not found"


class MethodNotAllowed(ApiError):
    status, code, title = 405, "method_not_allowed", "Method not allowed"


class Conflict(ApiError):
    status, code, title = 409, "conflict", "Conflict"


class Gone(ApiError):
    status, code, title = 410, "gone", "Gone"


class TooLarge(ApiError):
    status, code, title = 413, "too_large", "Content too large"


class Unprocessable(ApiError):
    status, code, title = 422, "invalid_request", "Invalid request"


class TooManyRequests(ApiError):
    status, code, title = 429, "too_many_requests", "Too many requests"


class Unavailable(ApiError):
    status, code, title = 503, "unavailable", "Service unavailable"


class FieldError(BaseModel):
    param: str = Field(description="The field, parameter or line at fault", examples=["line 17"])
    message: str


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str = Field(examples=["Invalid request"])
    status: int = Field(examples=[422])
    code: str = Field(examples=["invalid_request"])
    detail: str
    param: str | None = None
    errors: list[FieldError] | None = None
    request_id: str


def problem_response(request: Request, error: ApiError) -> JSONResponse:
    request_id = getattr(request.state, "request_id", "")
    problem = Problem(
        title=error.title,
        status=error.status,
        code=error.problem_code,
        detail=error.detail,
        param=error.param,
        errors=None if error.errors is None else [FieldError.model_validate(e) for e in error.errors],
        request_id=request_id,
    )
    # Set here as well as by the middleware: the answer to a crash is made outside of it.
    headers = {"X-Request-Id": request_id, **error.headers}
    return JSONResponse(
        problem.model_dump(exclude_none=True), status_code=error.status, media_type=MEDIA_TYPE, headers=headers
    )


def _path(location: Sequence[str | int]) -> str:
    """('body', 'embedding', 'blocks') -> 'embedding.blocks': the name by which the client knows the field."""
    parts = [str(part) for part in location]
    return ".".join(parts[1:] if parts and parts[0] in ("body", "query", "path", "header") else parts) or "body"


def _methods_of(request: Request) -> list[str]:
    """Of every route of the path; the framework's own answer names those of the first one alone."""
    contexts = iter_route_contexts(request.app.routes)
    found = (c.methods or set() for c in contexts if c.path and compile_path(c.path)[0].match(request.url.path))
    return sorted(set().union(*found))


def field_error(error: Mapping[str, Any]) -> dict[str, str]:
    """One of pydantic's errors under the client's name of the field, without words that speak of pydantic."""
    unknown = error["type"] == "extra_forbidden"
    message = "there is no such field" if unknown else str(error["msg"]).removeprefix("Value error, ")
    return {"param": _path(error["loc"]), "message": message}


def install(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> JSONResponse:
        return problem_response(request, error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [field_error(e) for e in error.errors()]
        first = errors[0]
        return problem_response(
            request, Unprocessable(f"{first['param']}: {first['message']}", param=first["param"], errors=errors)
        )

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == MethodNotAllowed.status:
            methods = ", ".join(_methods_of(request))
            detail = f"{request.method} is not possible here; possible: {methods}."
            return problem_response(request, MethodNotAllowed(detail, headers={"Allow": methods}))
        if error.status_code == BadRequest.status:  # a body that is not UTF-8
            return problem_response(request, Unprocessable("The body cannot be read as JSON in UTF-8.", param="body"))
        kinds: dict[int, type[ApiError]] = {404: NotFound, 401: Unauthorized, 413: TooLarge}
        kind = kinds.get(error.status_code)
        if kind is None:
            kind = type("HttpError", (ApiError,), {"status": error.status_code, "code": "http_error", "title": "Error"})
        return problem_response(request, kind(str(error.detail), headers=error.headers))

    @app.exception_handler(DBAPIError)
    async def _database(request: Request, error: DBAPIError) -> JSONResponse:
        if not is_away(error):
            return await _unforeseen(request, error)
        log.warning("%s %s: the database is away (%s)", request.method, request.url.path, error.orig)
        detail = "The database does not answer. Try again soon; what you sent may have been kept: look before you post it again."
        return problem_response(request, Unavailable(detail, code="database_away", headers={"Retry-After": "2"}))

    @app.exception_handler(Busy)
    async def _busy(request: Request, error: Busy) -> JSONResponse:  # noqa: ARG001
        detail = "The service has more to do than it can at the moment; nothing was done. Try again soon."
        return problem_response(request, Unavailable(detail, code="busy", headers={"Retry-After": "5"}))

    @app.exception_handler(OSError)
    async def _storage(request: Request, error: OSError) -> JSONResponse:
        if isinstance(error, FileNotFoundError):
            log.error("%s %s: %s is gone", request.method, request.url.path, error.filename or error)
            detail = "The files of this dataset are gone from the artifact store. Upload the dataset again and post a new job."
            return problem_response(request, Gone(detail, code="files_missing"))
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return await _unforeseen(request, error)
        log.error("%s %s: no room left on %s", request.method, request.url.path, error.filename)
        detail = "There is no room left to store this; nothing was kept. Try again later."
        return problem_response(request, Unavailable(detail, code="storage_full", headers={"Retry-After": "60"}))

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
        # What crashed is told outside of the middlewares, hence of what they have bound.
        with logs.bound(request_id=getattr(request.state, "request_id", "")):
            log.exception("unforeseen error in %s %s", request.method, request.url.path, exc_info=error)
        return problem_response(
            request, ApiError("Something went wrong on our side; it is logged under this request_id.")
        )


def responses(*kinds: type[ApiError]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route: each error it can answer with; openapi.py gives them their schema."""
    return {kind.status: {"description": kind.title} for kind in kinds}
