"""The body of a request: not a byte of it is read before its sender has been admitted by the head alone, none beyond its
limit, and no sender is waited for who is slower than its budget.

This is a middleware around `receive`, by which every route reads its body whether FastAPI parses it or the route streams it, so
it holds for a new route too. Requests without a body, and those whose body nobody reads, cost nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.errors import RequestTimeout, TooLarge


@dataclass(frozen=True, slots=True)
class BodyBudget:
    """What a body may have: bytes (None: the route counts them), and seconds of waiting for its sender, who gets `grace_seconds`
    and a second more for every `bytes_per_second` that arrived."""

    max_bytes: int | None
    grace_seconds: float
    bytes_per_second: int

    def check_size(self, size: int) -> None:
        if self.max_bytes is not None and size > self.max_bytes:
            raise TooLarge(
                f"The body is larger than {self.max_bytes:,} bytes, the limit of this call. Send less at a time."
            )

    def seconds(self, size: int) -> float:
        """How long `size` bytes and the next ones may be waited for."""
        return self.grace_seconds + size / self.bytes_per_second


def set_budget(request: Request, budget: BodyBudget) -> None:
    """Gives a request another budget than the usual one. Before its body is read."""
    request.state.body_budget = budget


class GuardBodies:
    """The middleware. `admit` raises an ApiError for a request whose sender may not send a body.

    Reading raises:
        TooLarge: the body is larger than its limit; where its Content-Length says so, none of it is read.
        RequestTimeout: its sender is slower than the budget.
    """

    def __init__(self, app: ASGIApp, admit: Callable[[Request], Awaitable[object]], budget: BodyBudget) -> None:
        self._app, self._admit, self._budget = app, admit, budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            receive = _Body(Request(scope), receive, self._admit, self._budget).receive
        await self._app(scope, receive, send)


class _Body:
    def __init__(
        self, request: Request, receive: Receive, admit: Callable[[Request], Awaitable[object]], usual: BodyBudget
    ) -> None:
        self._request, self._receive, self._admit, self._usual = request, receive, admit, usual
        self._is_admitted = self._is_whole = False
        self._size, self._waited_seconds = 0, 0.0

    async def receive(self) -> Message:
        if self._is_whole:  # what follows is that the client has left, which is waited for as long as the answer takes
            return await self._receive()
        budget: BodyBudget = getattr(self._request.state, "body_budget", self._usual)
        if self._size == 0 and (announced := _announced(self._request)):
            await self._require_admission()
            budget.check_size(announced)
        message = await self._next(budget)
        if message.get("body"):  # HTTP/2 need not announce it
            await self._require_admission()
        self._size += len(message.get("body", b""))
        budget.check_size(self._size)
        self._is_whole = not message.get("more_body", False)  # or there is no more of it: the client has left
        return message

    async def _require_admission(self) -> None:
        if not self._is_admitted:
            await self._admit(self._request)
            self._is_admitted = True

    async def _next(self, budget: BodyBudget) -> Message:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            # The waiting alone counts: what the service does between two pieces is not the sender's time.
            async with asyncio.timeout(budget.seconds(self._size) - self._waited_seconds):
                return await self._receive()
        except TimeoutError as error:
            raise RequestTimeout(
                f"The body came too slowly: {self._size:,} bytes in {budget.seconds(self._size):.1f} seconds; at least"
                f" {budget.bytes_per_second:,} a second are needed after the first {budget.grace_seconds:g} seconds."
                " Send the request again, over a faster connection or with a smaller body."
            ) from error
        finally:
            self._waited_seconds += loop.time() - started


def has_body(request: Request) -> bool:
    """Whether the head says that a body follows."""
    return _announced(request) > 0


def _announced(request: Request) -> int:
    """The bytes that the head says will follow, at least; 0: none."""
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit():
        return int(length)
    return int("transfer-encoding" in request.headers)
