"""What can go wrong, as exceptions. All of them are `WinnowError`; `code` is the attribute to branch on within a class."""

import json
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx


class WinnowError(Exception):
    """The service refused, or could not be asked.

    Attributes:
        status: of the HTTP response; None where there was none.
        code: what went wrong, for programs: `invalid_rows`, `quota_exceeded`, ...
        detail: the same in words, with what to do.
        param: the field, parameter or line at fault; None: no single one.
        errors: each field, parameter or line at fault, as `{"param": ..., "message": ...}`.
        request_id: by which the service's log has the request.
        retry_after: seconds after which the service may do it; None: it did not say.
    """

    def __init__(
        self,
        status: int | None,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        errors: list[dict[str, str]] | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}" + (f" (request {request_id})" if request_id else ""))
        self.status = status
        self.code = code
        self.detail = detail
        self.param = param
        self.errors = errors or []
        self.request_id = request_id
        self.retry_after = retry_after


class InvalidRequest(WinnowError):
    """400, 413, 414, 422: what was sent cannot be used; `param` and `errors` say which part of it."""


class Unauthorized(WinnowError):
    """401: the key is missing, unknown, expired or revoked."""


class Forbidden(WinnowError):
    """403: the key may not do this; its scopes say what it may."""


class NotFound(WinnowError):
    """404, 410: there is no such thing in your tenant, or it has been deleted."""


class Conflict(WinnowError):
    """409: not in the state that things are in now."""


class RateLimited(WinnowError):
    """429: a limit of the key is used up; `retry_after` says when it is worth another try."""


class ServiceError(WinnowError):
    """5xx: the service, or something in between, has failed."""


class UnexpectedAnswer(WinnowError):
    """The answer is not one of this service, or of a version that this client cannot read."""


class Unreachable(WinnowError):
    """The service could not be reached, or the connection was lost; `status` is None."""

    def __init__(self, error: httpx.TransportError, advice: str = "Is the service running?") -> None:
        self.error = error
        reason = str(error) or type(error).__name__
        super().__init__(None, "unreachable", f"{error.request.url} did not respond: {reason}. {advice}")


class NoAddress(WinnowError, ValueError):
    """It is not known which service is meant, or which key is its."""

    def __init__(self, detail: str) -> None:
        super().__init__(None, "no_address", detail)

    def __str__(self) -> str:
        return self.detail


_OF_STATUS: dict[int, type[WinnowError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: NotFound,
    413: InvalidRequest,
    414: InvalidRequest,
    422: InvalidRequest,
    429: RateLimited,
}


def refusal(response: httpx.Response, body: bytes) -> WinnowError:
    """The error of a response: the service's problem details, or the response of a proxy in between."""
    status = response.status_code
    kind = _OF_STATUS.get(status, ServiceError if status >= 500 else WinnowError)
    waits = retry_after(response)
    if response.headers.get("Content-Type", "").startswith("application/problem+json"):
        problem: dict[str, Any] = json.loads(body)
        given = {name: problem.get(name) for name in ("param", "errors", "request_id")}
        return kind(status, problem["code"], problem["detail"], retry_after=waits, **given)
    if response.has_redirect_location:
        target = response.headers["Location"]
        detail = f"{response.request.url} redirects to {target}. A key is not sent on: pass the URL that is meant."
        return kind(status, "redirected", detail)
    text = body[:200].decode(errors="replace")
    return kind(status, "http_error", f"{status} {text}", retry_after=waits)


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that are to be waited before another try; the service sends seconds, a proxy in between perhaps a date."""
    value = response.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
