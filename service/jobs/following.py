"""Waiting for the end of a job, and its events as they happen (server-sent events)."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from threading import BoundedSemaphore

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy.exc import DBAPIError
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.database import Sessions, in_turn, is_away
from service.errors import Unavailable
from service.jobs import repository, service
from service.jobs.schemas import EventOut, SelectionJobOut
from service.jobs.state import TERMINAL
from service.jobs.watch import Watch

log = logging.getLogger(__name__)

MOST_STREAMS = 1_000
_READ_EVENTS = 100
_KEEPALIVE_SECONDS = 15.0
_RECONNECT_MILLISECONDS = 2_000

_streams = BoundedSemaphore(MOST_STREAMS)


async def until_ended(request: Request, tenant_id: str, job_id: str, seconds: float) -> SelectionJobOut:
    """The job when it has ended, or as it is after `seconds`, or when its client has left.

    Raises:
        NotFound: the tenant has no such job, or not any more.
    """
    sessions: Sessions = request.app.state.sessions
    watch: Watch = request.app.state.watch
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds

    def has_ended() -> bool:
        with sessions() as session:
            return service.require(session, tenant_id, job_id).status in TERMINAL

    def describe() -> SelectionJobOut:
        with sessions() as session:
            return service.describe(session, [service.require(session, tenant_id, job_id)])[0]

    async with watch.waiting(job_id, request) as waiter:
        while not await in_turn(request, has_ended) and not waiter.gone and (left := deadline - loop.time()) > 0:
            await waiter.wait(left)
    return await in_turn(request, describe)


class EventStream(StreamingResponse):
    """The events of a job that follow `after`, each as it happens, and the end after the last that there will be."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, tenant_id: str, job_id: str, after: int) -> None:
        headers = {"Cache-Control": "no-store", "Vary": "Accept", "X-Accel-Buffering": "no"}
        super().__init__(self._stream(), headers=headers)
        self._request, self._tenant_id, self._job_id, self._after = request, tenant_id, job_id, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _streams.acquire(blocking=False):
            raise Unavailable(
                f"This server follows {MOST_STREAMS} jobs at a time, its most. Poll the job, or try again soon.",
                code="too_many_streams",
                headers={"Retry-After": "5"},
            )
        try:
            await super().__call__(scope, receive, send)
        finally:
            _streams.release()

    async def _stream(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        watch: Watch = self._request.app.state.watch
        yield format_sse_event(retry=_RECONNECT_MILLISECONDS)
        sent_at = loop.time()
        async with watch.waiting(self._job_id, self._request) as waiter:
            while True:
                is_over, events = await in_turn(self._request, self._look)
                for event in events:
                    yield format_sse_event(event=event.type, id=str(event.id), data_str=event.model_dump_json())
                    self._after, sent_at = event.id, loop.time()
                if len(events) == _READ_EVENTS:
                    continue
                if is_over or waiter.gone:
                    return
                if loop.time() - sent_at >= _KEEPALIVE_SECONDS:
                    yield KEEPALIVE_COMMENT
                    sent_at = loop.time()
                await waiter.wait(sent_at + _KEEPALIVE_SECONDS - loop.time())

    def _look(self) -> tuple[bool, Sequence[EventOut]]:
        """Whether there will be no more events, and the next. A stream that cannot go on ends: its client comes back."""
        sessions: Sessions = self._request.app.state.sessions
        try:
            with sessions() as session:
                # In this order: the event of a job's end is there as soon as its status is.
                job = repository.get(session, self._tenant_id, self._job_id)
                is_over = job is None or job.status in TERMINAL
                found = repository.events(session, self._job_id, after=self._after, limit=_READ_EVENTS - 1)
        except DBAPIError as error:
            if not is_away(error):
                raise
            log.warning("events of %s: the database is away (%s)", self._job_id, error.orig)
            return True, []
        return is_over, [EventOut.model_validate(event) for event in found]
