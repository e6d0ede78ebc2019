"""Answers to the most frequent requests, given before the application routes, resolves dependencies and takes a thread.

What is not answered here goes on, and is answered as if this were not here: each of these answers is the one that the route
gives, byte for byte, and a test compares them.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class QuickAnswer:
    """`answer` is called with what `path` names, and returns None for a request that it leaves to `route`."""

    path: re.Pattern[str]
    route: Callable[..., Any]
    answer: Callable[..., Awaitable[Response | None]]


class QuickAnswers:
    """The middleware: for GET requests whose path is one of these."""

    def __init__(self, app: ASGIApp, answers: Sequence[QuickAnswer]) -> None:
        self._app = app
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET":
            for quick in self._answers:
                if (match := quick.path.fullmatch(scope["path"])) is None:
                    continue
                named = match.groupdict()
                response = await quick.answer(Request(scope), **named)
                if response is not None:
                    scope["endpoint"], scope["path_params"] = quick.route, named
                    await response(scope, receive, send)
                    return
        await self._app(scope, receive, send)
