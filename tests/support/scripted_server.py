"""A scripted server for the Python client, and the asynchronous client behind the interface of the synchronous one."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx

from winnow import AsyncWinnow
from winnow.answers import Answer

Step = httpx.Response | Exception
Connect = Callable[..., Any]  # the fixture `connect`: a context manager with a client of the server that it is given

PROBLEM = {
    "type": "about:blank",
    "title": "Invalid request",
    "status": 422,
    "code": "invalid_rows",
    "detail": "line 2: has no known form",
    "param": "line 2",
    "errors": [{"param": "line 2", "message": "has no known form"}],
    "request_id": "req_1",
}


def problem(status: int = 422, headers: dict[str, str] | None = None, **changed: Any) -> httpx.Response:
    content = json.dumps(PROBLEM | {"status": status} | changed)
    return httpx.Response(
        status, content=content, headers={"Content-Type": "application/problem+json", **(headers or {})}
    )


class Server(httpx.MockTransport):
    """Answers with the steps of a script, one after the other, and keeps the requests."""

    def __init__(self, *script: Step) -> None:
        self.script = list(script)
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        return self.answer(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        return self.answer(request)

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    @property
    def params(self) -> list[dict[str, str]]:
        return [dict(request.url.params) for request in self.requests]


class Blocking:
    """An asynchronous client, each of whose calls is run to its end, so that one test does for both."""

    def __init__(self, client: AsyncWinnow, runner: asyncio.Runner) -> None:
        self._client, self._runner = client, runner

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self._items(result) if hasattr(result, "__anext__") else self._runner.run(result)

        return call

    def _items(self, items: Any) -> Iterator[Any]:
        try:
            while True:
                yield self._runner.run(items.__anext__())
        except StopAsyncIteration:
            return
        finally:
            self._runner.run(items.aclose())


class Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that comes in pieces, and may be interrupted."""

    def __init__(self, *chunks: bytes, broken: bool = False) -> None:
        self.chunks, self.broken, self.closed = chunks, broken, False

    def __iter__(self) -> Iterator[bytes]:
        yield from self.chunks
        if self.broken:
            raise httpx.RemoteProtocolError("incomplete chunked read")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self:
            yield chunk

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def plain(answer: Any) -> Any:
    """The JSON that an answer was made of."""
    if isinstance(answer, Answer):
        return answer.to_dict()
    return [plain(each) for each in answer] if isinstance(answer, list) else answer


def page(data: list[Any], last: Any, has_more: bool) -> httpx.Response:
    return httpx.Response(200, json={"object": "list", "data": data, "has_more": has_more, "last_id": last})
