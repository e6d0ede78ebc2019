"""uvicorn's HTTP protocol with a budget for the head of a request: `--http service.http.protocol:TimedHeads`.

uvicorn waits for ever for the first request of a connection, and for the end of a head that has begun; each costs a file
descriptor, of which a process has few. Its parser, httptools, keeps as much of a head as is sent, and a request for each that
comes before the first is answered. The body has its own budget, see bodies.py.
"""

import asyncio
import logging
import secrets
from typing import Any, ClassVar, cast

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.http.errors import AddressTooLong, ApiError, BadRequest, HeadTooLarge, problem

MAX_ADDRESS_BYTES = 65_535  # what httptools takes, and httpx sends; most proxies take less
MAX_HEAD_BYTES = 98_304  # with the address
MAX_HEADERS = 500  # each costs more memory than its bytes
MAX_PIPELINED = 100
_MOST_HELD = 65_536
_PIECE = 16_384  # so much may be too much before it is noticed

log = logging.getLogger(__name__)


class _OneWrite:
    """A transport that writes at the end of the loop's turn what was written during it: uvicorn writes the head and the body of
    an answer one after the other, which are two system calls, and two packets."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held: list[bytes] = []
        self._bytes = 0

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._bytes += len(data)
        if self._bytes > _MOST_HELD:  # a stream may write without an end within one turn
            self._flush()

    def write_eof(self) -> None:
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            held, self._held, self._bytes = self._held, [], 0
            self._transport.write(held[0] if len(held) == 1 else b"".join(held))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class TimedHeads(HttpToolsProtocol):
    """Refuses a head that is too large or malformed with a problem, and closes a connection on which for `head_seconds` nothing
    was answered and no head has become whole, be it that nothing came, that too little of a head came, or the rest of a body
    that was refused."""

    head_seconds: ClassVar[float] = 15.0
    _deadline: asyncio.TimerHandle | None = None
    _unparsed = 0  # bytes of a head, of trailers, or between chunks of a body, since the parser last finished something
    _is_in_head = False
    _is_over = False  # nothing more is read
    _refusal: ApiError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(cast(asyncio.Transport, _OneWrite(transport, self.loop)))
        self._watch()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _PIECE):
            if self._is_over:
                break
            piece = data[start : start + _PIECE]
            self._unparsed += len(piece)
            super().data_received(piece)
            if self._unparsed > MAX_HEAD_BYTES and not self._is_over:
                self._refusal = HeadTooLarge(
                    f"The head of the request is larger than {MAX_HEAD_BYTES:,} bytes. Send fewer or shorter headers."
                )
                self.send_400_response("")
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    # What the parser calls. An error ends its work, and is answered by send_400_response.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refuse(BadRequest(f"More than {MAX_PIPELINED} requests came before the answer to the first."))

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_ADDRESS_BYTES:
            self._refuse(
                AddressTooLong(
                    f"The address is longer than {MAX_ADDRESS_BYTES:,} bytes. Send shorter parameters: the fixed text of a"
                    " template can be a column of the rows."
                )
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_in_head:
            return  # a trailer, which would count as a header of the request that is being answered
        if len(self.headers) >= MAX_HEADERS:
            self._refuse(HeadTooLarge(f"The request has more than {MAX_HEADERS} headers. Send fewer."))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head, self._unparsed = False, 0
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            self._refuse(BadRequest("The request must have one header Host."))
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed = 0
        super().on_message_complete()

    def _refuse(self, error: ApiError) -> None:
        self._refusal = error
        raise error

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # ours says more
        """Answers what cannot be read, once what came before it is answered; nothing more is read."""
        self._is_over = True
        refusal = self._refusal or BadRequest("This is no valid HTTP request.")
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self.pipeline or not cycle.more_body:  # answers are owed before, the last of which ends the connection
                cycle.keep_alive = False
                return
            if cycle.response_started:
                self.transport.close()
                return
        request_id = f"req_{secrets.token_hex(8)}"
        answer = problem(refusal, request_id)
        headers = [*self.server_state.default_headers, *answer.raw_headers, (b"connection", b"close")]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[refusal.status], lines, bytes(answer.body)))
        if (
            self.transport.can_write_eof()
        ):  # closing while the rest comes may take the answer from who has yet to read it
            self.transport.write_eof()
        else:
            self.transport.close()
        log.info("%d %s: %s", refusal.status, refusal.code, refusal.detail, extra={"request_id": request_id})

    def _unsupported_upgrade_warning(self) -> None:
        """What follows such a request may be of another protocol, and uvicorn has dropped a part of it."""
        self._is_over = True
        self.cycle.keep_alive = False
        if self.cycle.response_complete:
            self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, _unchunked(app, cycle) if cycle.scope["http_version"] == "1.0" else app)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # a request is being answered
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.head_seconds, self.transport.close)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _unchunked(app: Any, cycle: RequestResponseCycle) -> Any:
    """For a client of HTTP/1.0, which knows no chunks: an answer without a length ends with its connection."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        has_length = True

        async def send_plain(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = "content-length" in Headers(raw=message["headers"])
                cycle.chunked_encoding = None if has_length else False
            elif not has_length:  # uvicorn is told the length of each piece as it comes
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return answer
