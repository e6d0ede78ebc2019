"""Responses that stream what is made piece by piece: results, reports."""

import logging
from collections.abc import AsyncIterator, Callable, Generator

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.http.errors import Unauthorized
from service.shares import Shares

log = logging.getLogger(__name__)


class Download(StreamingResponse):
    """Streams bytes from a generator, and closes it whatever happens.

    `check` raises Unauthorized when the caller's key is not valid any more; it is called before each piece. As long as none was
    sent, that is the answer; later the connection is closed without the end of the body, so that no client takes it for whole.
    """

    def __init__(
        self,
        shares: Shares,
        tenant_id: str,
        content: Generator[bytes],
        *,
        check: Callable[[], None],
        media_type: str,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._shares, self._tenant_id, self._content, self._check = shares, tenant_id, content, check
        super().__init__((), media_type=media_type, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._shares.downloads.taken(self._tenant_id):
            try:
                # A failure before the first bytes still gets its own status, since none has been sent.
                first = await self._next()
                self.body_iterator = self._rest(first)
                await super().__call__(scope, receive, send)
            finally:
                self._content.close()

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except Unauthorized:
            log.warning("a download was cut off: its key is not valid any more")

    async def _next(self) -> bytes:
        """The next bytes, empty at the end. Runs on few threads, apart from those of other requests, tenants in turn."""
        async with self._shares.encoders.waited_for(self._tenant_id):
            return await run_sync(self._make, limiter=CapacityLimiter(1))

    def _make(self) -> bytes:
        self._check()
        return next(self._content, b"")

    async def _rest(self, part: bytes) -> AsyncIterator[bytes]:
        while part:
            yield part
            part = await self._next()
