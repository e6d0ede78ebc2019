"""Errors as the client sees them: RFC 9457 problem details (application/problem+json) with a stable `code`.

Raise a subclass of `ApiError` anywhere below a router; the handlers turn it, validation errors and everything unforeseen
into the same shape: {type, title, status, code, detail, param?, errors?, request_id}.
"""

import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from psycopg.errors import DiskFull
from pydantic import BaseModel, Field
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import compile_path

from service.db.engine import is_away
from service.http.headers import SECURITY_HEADERS
from service.observability import logs
from service.shares import UsedUp
from service.storage.checksums import ArtifactDamaged

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"


class ApiError(Exception):
    """An error with a place in the API. `param` names the field, parameter or line at fault; `detail` says what to do.

    `retry`: whether the same request may succeed later; default: for 408, 429 and 5xx. Clients like OpenAI's retry every 409
    unless `x-should-retry` is false.
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
        self.retry = self.status >= 500 or self.status in (408, 429) if retry is None else retry
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


class RequestTimeout(ApiError):
    status, code, title = 408, "request_timeout", "Request timeout"


class Conflict(ApiError):
    status, code, title = 409, "conflict", "Conflict"


class Gone(ApiError):
    status, code, title = 410, "gone", "Gone"


class TooLarge(ApiError):
    status, code, title = 413, "too_large", "Content too large"


class AddressTooLong(ApiError):
    status, code, title = 414, "address_too_long", "Address too long"


class Unprocessable(ApiError):
    status, code, title = 422, "invalid_request", "Invalid request"


class TooManyRequests(ApiError):
    status, code, title = 429, "too_many_requests", "Too many requests"


class HeadTooLarge(ApiError):
    status, code, title = 431, "head_too_large", "Head too large"


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
    code: str = Field(
        description="What went wrong, for programs. Any call may be answered 503: `busy` (all database connections of"
        " the server are in use), `database_away`, `database_full`",
        examples=["invalid_request"],
    )
    detail: str
    param: str | None = None
    errors: list[FieldError] | None = None
    request_id: str


ErrorPage = Callable[[Request, ApiError], Response | None]
"""What a browser is shown instead of a problem; None: the request is not a page's."""


def problem_response(request: Request, error: ApiError) -> Response:
    page: ErrorPage | None = getattr(request.app.state, "error_page", None)
    shown = None if page is None else page(request, error)
    return shown or problem(error, getattr(request.state, "request_id", ""))


def problem(error: ApiError, request_id: str) -> JSONResponse:
    """The answer, also where there is no request that could be read."""
    said = Problem(
        title=error.title,
        status=error.status,
        code=error.problem_code,
        detail=error.detail,
        param=error.param,
        errors=None if error.errors is None else [FieldError.model_validate(e) for e in error.errors],
        request_id=request_id,
    )
    # Set here as well as by the middleware: the answer to a crash is made outside of it.
    headers = {"X-Request-Id": request_id, **SECURITY_HEADERS, **error.headers}
    return JSONResponse(
        said.model_dump(exclude_none=True), status_code=error.status, media_type=MEDIA_TYPE, headers=headers
    )


def field_error(error: Mapping[str, Any]) -> dict[str, str]:
    """One of pydantic's errors under the client's name of the field: ('body', 'embedding', 'blocks') -> embedding.blocks."""
    unknown = error["type"] == "extra_forbidden"
    message = "unknown field" if unknown else str(error["msg"]).removeprefix("Value error, ")
    parts = [str(part) for part in error["loc"]]
    if parts and parts[0] in ("body", "query", "path", "header"):
        del parts[0]
    return {"param": ".".join(parts) or "body", "message": message}


def malformed(body: bytes | str, position: int, why: str) -> Unprocessable:
    """The error of a body that is no JSON from this position on."""
    newline: Any = b"\n" if isinstance(body, bytes) else "\n"
    line = body.count(newline, 0, position) + 1
    place = f"line {line}, column {position - body.rfind(newline, 0, position)}"
    return Unprocessable(f"The body is not valid JSON at {place}: {why}.", param=place)


def install(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return problem_response(request, error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        if error.errors()[0]["type"] == "json_invalid":
            found = error.errors()[0]
            return problem_response(request, malformed(error.body, found["loc"][1], found["ctx"]["error"]))
        errors = [field_error(e) for e in error.errors()]
        first = errors[0]
        return problem_response(
            request, Unprocessable(f"{first['param']}: {first['message']}", param=first["param"], errors=errors)
        )

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        if error.status_code == MethodNotAllowed.status:
            # Of every route of the path; the framework's own response names those of the first one only.
            path, routes = request.url.path, iter_route_contexts(request.app.routes)
            matching = (r.methods or () for r in routes if r.path and compile_path(r.path)[0].match(path))
            methods = ", ".join(sorted(set().union(*matching)))
            detail = f"{request.method} is not allowed here; allowed: {methods}."
            return problem_response(request, MethodNotAllowed(detail, headers={"Allow": methods}))
        if error.__cause__ is not None:  # what reading or parsing the body raised, which the framework wraps
            return await _body(request, error.__cause__)
        kinds: dict[int, type[ApiError]] = {404: NotFound, 401: Unauthorized, 413: TooLarge}
        kind = kinds.get(error.status_code)
        if kind is None:
            kind = type("HttpError", (ApiError,), {"status": error.status_code, "code": "http_error", "title": "Error"})
        return problem_response(request, kind(str(error.detail), headers=error.headers))

    async def _body(request: Request, error: BaseException) -> Response:
        if isinstance(error, UnicodeDecodeError):
            return problem_response(request, malformed(error.object, error.start, "not UTF-8"))
        if isinstance(error, RecursionError):
            return problem_response(request, Unprocessable("The body is nested too deeply.", param="body"))
        handlers = request.app.exception_handlers
        handler = next(handlers[kind] for kind in type(error).__mro__ if kind in handlers)
        answer: Response = await handler(request, error)
        return answer

    @app.exception_handler(ClientDisconnect)
    async def _left(request: Request, error: ClientDisconnect) -> Response:  # noqa: ARG001
        return problem_response(request, BadRequest("The connection was closed before the end of the body."))

    @app.exception_handler(DBAPIError)
    async def _database(request: Request, error: DBAPIError) -> Response:
        if not is_away(error):
            return await _unforeseen(request, error)
        log.warning("%s %s: the database is unavailable (%s)", request.method, request.url.path, error.orig)
        if isinstance(error.orig, DiskFull):
            detail = "No disk space is left for the database; nothing was stored. Retry later."
            return problem_response(request, Unavailable(detail, code="database_full", headers={"Retry-After": "60"}))
        detail = (
            "The database is not available. Retry shortly; a POST may have taken effect: check before repeating it."
        )
        return problem_response(request, Unavailable(detail, code="database_away", headers={"Retry-After": "2"}))

    @app.exception_handler(PoolTimeout)
    async def _exhausted(request: Request, error: PoolTimeout | UsedUp) -> Response:
        log.warning("%s %s: no database connection is free (%s)", request.method, request.url.path, error)
        detail = "All database connections of this server are in use. Retry shortly."
        return problem_response(request, Unavailable(detail, code="busy", headers={"Retry-After": "5"}))

    @app.exception_handler(UsedUp)
    async def _used_up(request: Request, error: UsedUp) -> Response:
        kept: dict[str, Any] = {"param": error.name, "headers": {"Retry-After": "5"}}
        if error.of_tenant:
            detail = f"Your tenant holds {error.most:,} {error.name}, its share; nothing was done. Wait until one ends."
            return problem_response(request, TooManyRequests(detail, code="share_used_up", **kept))
        if error.name == "connections":
            return await _exhausted(request, error)
        detail = f"All {error.most:,} {error.name} of this server are in use; nothing was done. Retry shortly."
        return problem_response(request, Unavailable(detail, code=f"too_many_{error.name}", **kept))

    @app.exception_handler(OSError)
    async def _storage(request: Request, error: OSError) -> Response:
        if isinstance(error, FileNotFoundError):
            log.error("%s %s: %s is gone", request.method, request.url.path, error.filename or error)
            detail = (
                "Files of this dataset are missing from the artifact store, removed or set aside since they were damaged. Upload"
                " the same rows again, which repairs this dataset too; jobs that failed for it have to be posted again."
            )
            return problem_response(request, Gone(detail, code="files_missing"))
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return await _unforeseen(request, error)
        log.error("%s %s: no room left on %s", request.method, request.url.path, error.filename)
        detail = "No storage space is left; nothing was stored. Retry later."
        return problem_response(request, Unavailable(detail, code="storage_full", headers={"Retry-After": "60"}))

    @app.exception_handler(ArtifactDamaged)
    async def _damaged(request: Request, error: ArtifactDamaged) -> Response:
        log.error("%s %s: %s", request.method, request.url.path, error)
        detail = (
            "Files of this dataset were damaged in the artifact store and have been set aside. Upload the same rows again, which"
            " repairs this dataset too; jobs that failed for it have to be posted again."
        )
        return problem_response(request, Gone(detail, code="files_damaged"))

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> Response:
        # A crash is logged outside of the middlewares, hence without what they have bound.
        with logs.bound(request_id=getattr(request.state, "request_id", "")):
            log.exception("unforeseen error in %s %s", request.method, request.url.path, exc_info=error)
        return problem_response(request, ApiError("An internal error occurred; it is logged under this request_id."))


def responses(*kinds: type[ApiError]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route: each error it can answer with; openapi.py gives them their schema."""
    return {kind.status: {"description": kind.title} for kind in kinds}
