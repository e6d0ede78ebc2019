"""Waiting for the end of a job, and its events as they happen (server-sent events)."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy.exc import DBAPIError
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service import ledger
from service.auth.principal import Principal
from service.auth.repository import is_live
from service.db.engine import Sessions, is_away, run_with_connection
from service.db.reader import Away
from service.jobs import repository
from service.jobs.notifications import JobNotifications
from service.jobs.schemas import EventOut
from service.ledger.state import TERMINAL
from service.shares import UsedUp

log = logging.getLogger(__name__)

_READ_EVENTS = 100
_KEEPALIVE_SECONDS = 15.0
_RECONNECT_MILLISECONDS = 2_000
_STATUS = "SELECT status FROM selection_jobs WHERE id = %(job)s AND tenant_id = %(tenant)s AND deleted_at IS NULL"


async def until_ended(request: Request, principal: Principal, job_id: str, seconds: float) -> None:
    """Returns when the job has ended, after `seconds`, or when its client has left.

    Raises:
        NotFound: the tenant has no such job, or not any more.
        UsedUp: too many requests wait.
    """
    sessions: Sessions = request.app.state.sessions
    notifications: JobNotifications = request.app.state.notifications
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds

    async def has_ended() -> bool:
        """Looks in the event loop, or where that fails in a thread, which says what is wrong."""
        job = {"job": job_id, "tenant": principal.tenant_id}
        with suppress(Away):
            if found := await request.app.state.reader.rows(principal.tenant_id, _STATUS, job):
                return found[0].status in TERMINAL
        return await run_with_connection(request, look)

    def look() -> bool:
        with sessions() as session:
            return ledger.require_job(session, principal.tenant_id, job_id).status in TERMINAL

    async with (
        request.app.state.shares.waiters.taken(principal.tenant_id),
        notifications.waiting(job_id, request) as waiter,
    ):
        while not await has_ended() and not waiter.gone and (left := deadline - loop.time()) > 0:
            await waiter.wait(left)


class EventStream(StreamingResponse):
    """The events of a job that follow `after`, each as it happens, and the end after the last that there will be, or when the
    key is not valid any more or the browser has logged out: its client comes again, and is told."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, principal: Principal, job_id: str, after: int) -> None:
        headers = {"Cache-Control": "no-store", "Vary": "Accept", "X-Accel-Buffering": "no"}
        super().__init__(self._stream(), headers=headers)
        self._request, self._principal, self._job_id, self._after = request, principal, job_id, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._request.app.state.shares.streams.taken(self._principal.tenant_id):
            await super().__call__(scope, receive, send)

    async def _stream(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        notifications: JobNotifications = self._request.app.state.notifications
        yield format_sse_event(retry=_RECONNECT_MILLISECONDS)
        sent_at = loop.time()
        async with notifications.waiting(self._job_id, self._request) as waiter:
            while True:
                try:
                    is_over, events = await run_with_connection(self._request, self._look)
                except UsedUp:  # its client reconnects, and is told
                    return
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
        """Whether these are the last events, and the events. On a database failure the stream ends, and its client reconnects."""
        sessions: Sessions = self._request.app.state.sessions
        try:
            with sessions() as session:
                if not is_live(session, self._principal):
                    return True, []
                # In this order: the event of a job's end is there as soon as its status is.
                job = ledger.find_job(session, self._principal.tenant_id, self._job_id)
                is_over = job is None or job.status in TERMINAL
                found, _ = repository.events(session, self._job_id, after=self._after, limit=_READ_EVENTS)
        except DBAPIError as error:
            if not is_away(error):
                raise
            log.warning("events of %s: the database is unavailable (%s)", self._job_id, error.orig)
            return True, []
        return is_over, [EventOut.model_validate(event) for event in found]
