"""Counts, times and logs every request."""

import logging
import time
from typing import Any

from fastapi import Request
from fastapi.routing import iter_route_contexts
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import ids
from service.observability import logs
from service.observability.metrics import HttpMetrics
from service.tenants.service import CallerDep

log = logging.getLogger("service.access")

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_NO_ROUTE = "(none)"


async def note_caller(request: Request, caller: CallerDep) -> None:
    """A dependency of all routes that need a key: the line of the request names the tenant."""
    request.state.tenant_id = caller.tenant_id


class Observe:
    """What is logged while a request runs carries its id; when it has ended, one line and the metrics tell of it."""

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
                self._tell(scope, status, time.perf_counter() - started)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = self._template(scope)
        self._metrics.requests.labels(method, route, str(status)).inc()
        # What a request waited for a job says nothing of how fast we are.
        self._metrics.seconds.labels(method, route).observe(seconds - scope["state"].get("waited_seconds", 0.0))
        fields: dict[str, Any] = {"method": method, "route": route, "status": status, "seconds": round(seconds, 4)}
        job_id = scope.get("path_params", {}).get("job_id", "")
        if ids.is_id("job", job_id):  # else it is whatever the client has put there
            fields["job_id"] = job_id
        if "tenant_id" in scope["state"]:
            fields["tenant"] = scope["state"]["tenant_id"]
        log.info("%s %s %d in %.3f s", method, route, status, seconds, extra=fields)

    def _template(self, scope: Scope) -> str:
        """The path of the request's route as it is documented; the route itself knows it without its router's prefix."""
        if not self._templates:
            contexts = iter_route_contexts(scope["app"].routes)
            self._templates = {context.endpoint: context.path or _NO_ROUTE for context in contexts}
        return self._templates.get(scope.get("endpoint"), _NO_ROUTE)
