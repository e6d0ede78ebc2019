"""The FastAPI application: routers, error shape, health, and the dispatcher beside them."""

import logging
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import errors, health, openapi
from service.artifacts import ArtifactStore
from service.audit.router import router as audit
from service.compression import Compress
from service.database import make_engine, make_sessions
from service.datasets.router import router as datasets
from service.dispatch import Dispatcher
from service.idempotency import service as idempotency
from service.jobs.router import router as jobs
from service.jobs.watch import Watch
from service.limits.rate import RateLimiter, limit_rate
from service.limits.router import router as usage
from service.models import router as models
from service.observability import exposition, logs
from service.observability.middleware import Observe, note_caller
from service.observability.traces import Traces
from service.results.router import router as results
from service.sealing import Sealer
from service.settings import ApiSettings, api_settings
from service.sweeper import Sweeper
from service.tenants.router import router as keys
from service.webhooks.connect import Outbound
from service.webhooks.router import router as webhooks
from service.webhooks.sender import Sender

log = logging.getLogger(__name__)

DESCRIPTION = """
Which samples of a pool help a target most, and how much: upload a pool and a target, post a selection job, poll it, fetch one
weight a sample. Every call but the health checks takes `Authorization: Bearer wnw_...`. Errors are RFC 9457 problem details.
"""


class RequestId:
    """Gives every request an id, the caller's `X-Request-Id` where it sent a sensible one; it comes back in the answer."""

    _sensible = re.compile(r"[A-Za-z0-9._-]{1,64}")

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if self._sensible.fullmatch(sent) else f"req_{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


def create_app(settings: ApiSettings | None = None) -> FastAPI:
    """Makes the application. Where no settings are given it reads them from the environment, and takes over the process's logs.

    Raises:
        pydantic.ValidationError: a setting is missing or wrong; it names the variable.
    """
    if settings is None:
        settings = api_settings()
        logs.configure(settings.log, service="api")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.store.sweep_scratch()
        dispatcher = Dispatcher(settings, metrics.dispatch)
        dispatcher.start()
        sweeper = Sweeper(settings, app.state.store)
        sweeper.start()
        sender = Sender(settings, app.state.sealer, app.state.outbound, metrics.webhooks)
        sender.start()
        app.state.dispatcher = dispatcher
        app.state.watch.start()
        app.state.watch.release_on_signals()
        yield
        app.state.watch.stop()
        sender.stop()
        sweeper.stop()
        dispatcher.stop()
        engine.dispose()
        metrics.close()
        traces.close()

    engine = make_engine(settings.database)
    metrics, traces = exposition.ApiMetrics(settings), Traces(settings.telemetry, "winnow-api")
    app = FastAPI(title="Winnow", version="0.1.0", description=DESCRIPTION, lifespan=lifespan)
    app.state.settings = settings
    app.state.engine = engine
    app.state.sessions = make_sessions(engine)
    app.state.store = ArtifactStore(settings.artifacts.url)
    app.state.sealer = Sealer(settings.secret_key.get_secret_value())
    app.state.outbound = Outbound(settings.webhooks)
    app.state.watch = Watch(settings.database)
    app.state.metrics = metrics
    app.state.rate = RateLimiter()
    app.add_middleware(Compress)
    app.add_middleware(Observe, metrics=metrics.http)
    app.add_middleware(RequestId)
    traces.instrument(app, engine)
    errors.install(app)
    idempotency.install(app)
    for router in (health.router, exposition.router):
        app.include_router(router)
    for router in (models, datasets, jobs, results, keys, usage, audit, webhooks):
        app.include_router(
            router,
            prefix="/v1",
            dependencies=[Depends(note_caller), Depends(limit_rate)],
            responses=errors.responses(errors.TooManyRequests),
        )
    openapi.install(app)
    return app
