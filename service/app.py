"""The FastAPI application: routers, error shape, health, and the dispatcher beside them."""

import gc
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI

from service.audit.router import router as audit
from service.auth.authentication import admitted
from service.auth.callers import Callers
from service.auth.rate_limit import Rates
from service.auth.uses import Uses
from service.background.dispatcher import Dispatcher
from service.background.job_starter import JobStarter
from service.background.sweeper import Sweeper
from service.background.webhook_sender import Sender
from service.datasets.import_schemas import ImportRequest
from service.datasets.router import router as datasets
from service.datasets.targets import router as targets
from service.datasets.uploads.router import router as uploads
from service.db.engine import make_engine, make_sessions
from service.db.reader import Reader
from service.health import exposition
from service.health import router as health
from service.http import docs, errors, openapi
from service.http.bodies import BodyBudget, GuardBodies
from service.http.compression import Compress
from service.http.middleware import EveryAnswer, Observe
from service.http.quick import QuickAnswer, QuickAnswers
from service.idempotency import service as idempotency
from service.jobs import reads
from service.jobs.notifications import JobNotifications
from service.jobs.router import get_job, list_events, list_jobs
from service.jobs.router import router as jobs
from service.keys.router import router as keys
from service.models.router import router as models
from service.observability import logs
from service.observability.traces import Traces
from service.peers import Peers
from service.previews.router import router as previews
from service.results.export import bound_memory
from service.results.router import router as results
from service.settings import ApiSettings, api_settings
from service.shares import Shares, allow_open_files
from service.storage.artifacts import ArtifactStore
from service.storage.encryption import Encryptor
from service.usage.router import router as usage
from service.web.admission import admit
from service.web.rendering import error_page
from service.web.router import router as pages
from service.webhooks.router import router as webhooks
from service.webhooks.safe_http import Outbound
from service.workers.router import router as workers

log = logging.getLogger(__name__)

_JOBS, _JOB = "/v1/selection-jobs", "/v1/selection-jobs/(?P<job_id>job_[0-9a-f]{32})"
QUICK = (
    QuickAnswer(re.compile(_JOB), get_job, reads.job_at_once),
    QuickAnswer(re.compile(_JOBS), list_jobs, reads.page_at_once),
    QuickAnswer(re.compile(f"{_JOB}/events"), list_events, reads.events_at_once),
)

DESCRIPTION = """
Which samples of a pool help a target most, and how much: upload a pool and a target, post a selection job, poll it, fetch one
weight per sample. Every call except the health checks takes `Authorization: Bearer wnw_...`. Errors are RFC 9457 problem details.
"""


def create_app(settings: ApiSettings | None = None) -> FastAPI:
    """Makes the application. Where no settings are given it reads them from the environment, and takes over the process's logs.

    Raises:
        pydantic.ValidationError: a setting is missing or wrong; it names the variable.
    """
    if settings is None:
        settings = api_settings()
        logs.configure(settings.log, in_thread=True, service="api")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        bound_memory()
        allow_open_files()
        app.state.store.remove_abandoned()
        loops = (
            Dispatcher(settings, metrics.dispatch),
            JobStarter(settings, app.state.store),
            Sweeper(settings, app.state.store),
            Sender(settings, app.state.encryptor, app.state.outbound, metrics.webhooks),
            app.state.notifications,
        )
        for loop in loops:
            loop.start()
        app.state.notifications.release_on_signals()
        await app.state.reader.open()
        await peers.open()
        gc.freeze()  # what was imported stays: collections need not go through it again and again
        yield
        await peers.close()
        await app.state.reader.close()
        for loop in reversed(loops):
            loop.stop()
        engine.dispose()
        metrics.close()
        traces.close()

    engine = make_engine(settings.database)
    peers = Peers(settings.broker.url)
    shares = Shares(settings.shares, connections=2 * settings.database.pool_size, peers=peers)
    metrics, traces = exposition.ApiMetrics(settings, shares), Traces(settings.telemetry, "winnow-api")
    app = FastAPI(
        title="Winnow",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own loads its scripts from elsewhere
        redoc_url=None,
    )
    peers.on_alone = metrics.shares.counting_alone.set
    app.state.settings = settings
    app.state.engine = engine
    app.state.sessions = make_sessions(engine)
    app.state.reader = Reader(settings.database, shares.reads, shares.writes)
    app.state.store = ArtifactStore(settings.artifacts.url)
    app.state.store.on_damage = lambda _key, _reason: metrics.storage.damaged.inc()
    app.state.encryptor = Encryptor(settings.secret_key.get_secret_value())
    app.state.outbound = Outbound(settings.webhooks)
    app.state.notifications = JobNotifications(settings.database)
    app.state.metrics = metrics
    app.state.rate = Rates(peers)
    app.state.shares, app.state.callers, app.state.uses = shares, Callers(), Uses()
    body = settings.requests
    budget = BodyBudget(body.max_body_bytes, body.grace_seconds, body.bytes_per_second)
    app.add_middleware(GuardBodies, admit=admit, budget=budget)
    app.add_middleware(QuickAnswers, answers=QUICK)
    app.add_middleware(Compress)
    app.add_middleware(Observe, metrics=metrics.http)
    app.add_middleware(EveryAnswer)
    traces.instrument(app, engine)
    if traces.are_made:
        app.state.reader.around = traces.statement
    errors.install(app)
    app.state.error_page = error_page
    idempotency.install(app)
    for router in (health.router, exposition.router, docs.router, pages):
        app.include_router(router)
    anywhere = errors.responses(errors.AddressTooLong, errors.TooManyRequests, errors.HeadTooLarge, errors.Unavailable)
    for router in (models, datasets, previews, targets, uploads, jobs, results, keys, usage, audit, webhooks, workers):
        app.include_router(
            router,
            prefix="/v1",
            dependencies=[Depends(admitted)],
            responses=anywhere,
        )
    openapi.install(app, bodies=[ImportRequest])
    return app
