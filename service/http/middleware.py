"""Middleware for every request: it gets an id, and is counted, timed and logged."""

import logging
import re
import secrets
import time
from typing import Any

from fastapi.routing import iter_route_contexts
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import ids
from service.http.headers import SECURITY_HEADERS
from service.observability import logs
from service.observability.api_metrics import HttpMetrics

log = logging.getLogger("service.access")

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_NO_ROUTE = "(none)"
_SECURITY_HEADERS = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]


class EveryAnswer:
    """Gives every request an id, the client's `X-Request-Id` if it is well-formed, and returns it in the response, with the
    headers that are for browsers; a route may have set others."""

    _well_formed = re.compile(r"[A-Za-z0-9._-]{1,64}")

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if self._well_formed.fullmatch(sent) else f"req_{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                ours = (*_SECURITY_HEADERS, (b"x-request-id", request_id.encode()))
                message["headers"] = [*message["headers"], *(header for header in ours if header[0] not in own)]
            await send(message)

        await self.app(scope, receive, send_with_headers)


class Observe:
    """Adds the id to every record that is logged during a request; at its end writes one log line and the metrics."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self.app = app
        self._metrics = metrics
        self._templates: dict[Any, str] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500  # what the client gets where the application raises before it has answered
        started = time.perf_counter()

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with logs.bound(request_id=scope["state"]["request_id"]), self._metrics.in_flight.track_inprogress():
            try:
                await self.app(scope, receive, send_noting)
            finally:
                self._record(scope, status, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        if not self._templates:  # as documented: a route itself knows its path without its router's prefix
            contexts = iter_route_contexts(scope["app"].routes)
            self._templates = {context.endpoint: context.path or _NO_ROUTE for context in contexts}
        route = self._templates.get(scope.get("endpoint"), _NO_ROUTE)
        self._metrics.requests.labels(method, route, str(status)).inc()
        # Time spent waiting for a job says nothing about how fast we are.
        self._metrics.seconds.labels(method, route).observe(seconds - scope["state"].get("waited_seconds", 0.0))
        fields: dict[str, Any] = {"method": method, "route": route, "status": status, "seconds": round(seconds, 4)}
        job_id = scope.get("path_params", {}).get("job_id", "")
        if ids.is_id("job", job_id):  # otherwise it is arbitrary text from the client
            fields["job_id"] = job_id
        if "tenant_id" in scope["state"]:
            fields["tenant"] = scope["state"]["tenant_id"]
        log.info("%s %s %d in %.3f s", method, route, status, seconds, extra=fields)
