"""Requests to the service for one API key: what is repeated, and how a refusal becomes an error."""

import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, cast

import httpx

Json = dict[str, Any]

_RETRY_STATUSES = frozenset({429, 502, 503, 504})
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0


class WinnowError(Exception):
    """The service refused. The attributes are those of its problem details; `code` is the one to branch on."""

    def __init__(
        self,
        status: int | None,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        errors: list[dict[str, str]] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}" + (f" (request {request_id})" if request_id else ""))
        self.status = status
        self.code = code
        self.detail = detail
        self.param = param
        self.errors = errors or []
        self.request_id = request_id


class Unreachable(WinnowError):
    """The service could not be reached, or the connection broke off; `status` is None."""

    def __init__(self, error: httpx.TransportError) -> None:
        what = str(error) or type(error).__name__
        super().__init__(None, "unreachable", f"{error.request.url} did not answer: {what}. Is the service up?")


class Connection:
    """A connection to the service, for one API key.

    A GET and a POST, which has an `Idempotency-Key`, are repeated when the connection fails and after 429, 502, 503 and 504,
    unless the service says that it is of no use or asks for more than half a minute; any other call only when no connection
    could be made, since it may otherwise have been carried out.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._http = httpx.Client(
            base_url=url.rstrip("/") + "/v1",
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=timeout,
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _pages(self, path: str, params: Mapping[str, str]) -> Iterator[Json]:
        """The entries of all pages."""
        page = self._json("GET", path, params=params)
        yield from page["data"]
        while page["has_more"]:
            page = self._json("GET", path, params={**params, "after": page["last_id"]})
            yield from page["data"]

    def _json(self, method: str, path: str, **options: Any) -> Json:
        return cast(Json, self._call(method, path, **options).json())

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        if method == "POST":
            options["headers"] = {"Idempotency-Key": str(uuid.uuid4())}
        return self._send(method, lambda: self._http.request(method, path, **options))

    @contextmanager
    def _stream(
        self, path: str, params: Mapping[str, str], headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        request = self._http.build_request("GET", path, params=params, headers=headers)
        response = self._send("GET", lambda: self._http.send(request, stream=True))
        try:
            yield response
        except httpx.TransportError as error:
            raise Unreachable(error) from error
        finally:
            response.close()

    def _send(self, method: str, send: Callable[[], httpx.Response]) -> httpx.Response:
        """The answer to a request that succeeded, repeated where that cannot do harm: a GET, and a POST by its key."""
        is_safe = method in ("GET", "POST")
        pause = _FIRST_PAUSE_SECONDS
        for left in range(self._retries, -1, -1):
            asked: float | None = None
            try:
                response = send()
                if response.is_success:
                    return response
                refusal = _refusal(response)
                if not is_safe or not _may_succeed(response, refusal) or left == 0:
                    raise refusal
                asked = _retry_after(response)
            except httpx.TransportError as error:
                if not (is_safe or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)) or left == 0:
                    raise Unreachable(error) from error
            time.sleep(asked if asked is not None else pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise AssertionError("the last attempt returns or raises")


def _may_succeed(response: httpx.Response, refusal: WinnowError) -> bool:
    """Whether the same request is worth sending again soon."""
    if response.headers.get("x-should-retry") == "false" or (_retry_after(response) or 0) > _LONGEST_PAUSE_SECONDS:
        return False
    return response.status_code in _RETRY_STATUSES or refusal.code == "idempotency_key_in_use"


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the service asks to wait; it never sends the other form, a date."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _refusal(response: httpx.Response) -> WinnowError:
    """The error that an answer tells of: problem details, or whatever something in between has said."""
    try:
        response.read()
    finally:
        response.close()
    if not response.headers.get("Content-Type", "").startswith("application/problem+json"):
        return WinnowError(response.status_code, "http_error", f"{response.status_code} {response.text[:200]}")
    problem = response.json()
    return WinnowError(
        response.status_code,
        problem["code"],
        problem["detail"],
        param=problem.get("param"),
        errors=problem.get("errors"),
        request_id=problem.get("request_id"),
    )
