"""Requests with one API key: which of them are retried, and how a refusal becomes an exception.

Both clients run the same coroutines. In the synchronous one nothing that is awaited suspends, so that a coroutine reaches its end
in a single step, without an event loop (`run`).
"""

import asyncio
import json
import random
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, cast, overload

import httpx

Json = dict[str, Any]
P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")  # what a method of the synchronous client returns
A = TypeVar("A")  # what one of the asynchronous client returns

_RETRY_STATUSES = frozenset({429, 502, 503, 504})
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 30.0


class WinnowError(Exception):
    """The service refused. The attributes are its problem details; `code` is the one to branch on."""

    def __init__(
        self,
        status: int | None,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        errors: list[dict[str, str]] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}" + (f" (request {request_id})" if request_id else ""))
        self.status = status
        self.code = code
        self.detail = detail
        self.param = param
        self.errors = errors or []
        self.request_id = request_id


class Unreachable(WinnowError):
    """The service could not be reached, or the connection was lost; `status` is None."""

    def __init__(self, error: httpx.TransportError, advice: str = "Is the service running?") -> None:
        self.error = error
        reason = str(error) or type(error).__name__
        super().__init__(None, "unreachable", f"{error.request.url} did not respond: {reason}. {advice}")


class Connection(ABC):
    """What both clients share. The abstract methods are all that differs between blocking and asynchronous I/O.

    A GET, a PUT, and a POST (it carries an `Idempotency-Key`), is retried when the connection fails and after 429, 502, 503 and
    504, unless the service says that this is useless or asks for more than half a minute. Any other call is retried only where no
    connection could be made: otherwise it may have been carried out.
    """

    _http: Any  # of the type `_client`
    _client: type[httpx.Client] | type[httpx.AsyncClient]

    def __init__(
        self, url: str, api_key: str, *, timeout: float = 60.0, retries: int = 4, transport: Any = None
    ) -> None:
        """Opens no connection yet.

        Args:
            timeout: seconds without progress after which a request counts as failed.
            retries: attempts after the first.
            transport: an httpx transport of the client's kind, for a proxy or for tests.
        """
        self._retries = retries
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = self._client(
            base_url=url.rstrip("/") + "/v1", headers=headers, timeout=timeout, transport=transport
        )

    @abstractmethod
    async def _send_once(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response: ...

    @abstractmethod
    async def _sleep(self, seconds: float) -> None: ...

    @abstractmethod
    def _chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The decoded body, as it arrives."""

    @abstractmethod
    async def _close_response(self, response: httpx.Response) -> None: ...

    @abstractmethod
    def _content(self, pieces: Iterator[bytes]) -> Any:
        """The pieces, which are read from a file, as a request's content."""

    @abstractmethod
    async def _off_loop(self, work: Callable[[], object]) -> None:
        """Does the work, which blocks, without blocking others."""

    @abstractmethod
    def _meanwhile(
        self, look: Callable[[], Coroutine[Any, Any, None]] | None, seconds: float
    ) -> AbstractAsyncContextManager[None]:
        """Calls `look` every so many seconds until the context ends; None: nothing."""

    async def _pages(self, path: str, params: Mapping[str, str | None]) -> AsyncGenerator[Json]:
        """The entries of all pages; parameters that are None are left out."""
        given = {name: value for name, value in params.items() if value is not None}
        page = await self._json("GET", path, params=given)
        for entry in page["data"]:
            yield entry
        while page["has_more"]:
            page = await self._json("GET", path, params={**given, "after": page["last_id"]})
            for entry in page["data"]:
                yield entry

    async def _json(self, method: str, path: str, **options: Any) -> Json:
        return cast(Json, (await self._call(method, path, **options)).json())

    async def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        if method == "POST":
            options["headers"] = {"Idempotency-Key": str(uuid.uuid4())}
        return await self._send(method, lambda: self._send_once(self._http.build_request(method, path, **options)))

    @asynccontextmanager
    async def _stream(
        self, path: str, params: Mapping[str, str], headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """The response, its body still to be read with `_chunks`."""
        request = self._http.build_request("GET", path, params=params, headers=headers)
        response = await self._send("GET", lambda: self._send_once(request, stream=True))
        try:
            yield response
        except httpx.TransportError as error:
            raise Unreachable(error) from error
        finally:
            await self._close_response(response)

    async def _lines(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The body split at line feeds only: text may hold the other characters at which str.splitlines breaks."""
        rest = b""
        async for chunk in self._chunks(response):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line

    async def _send(
        self, method: str, attempt: Callable[[], Awaitable[httpx.Response]], *, retries: int | None = None
    ) -> httpx.Response:
        """The successful response of the last attempt."""
        is_safe = method in ("GET", "POST", "PUT")
        pause = _FIRST_PAUSE_SECONDS
        for left in range(self._retries if retries is None else retries, -1, -1):
            asked: float | None = None
            try:
                response = await attempt()
                if response.is_success:
                    return response
                try:
                    body = b"".join([chunk async for chunk in self._chunks(response)])
                finally:
                    await self._close_response(response)
                refusal = _refusal(response, body)
                if not is_safe or not _may_succeed(response, refusal) or left == 0:
                    raise refusal
                asked = _retry_after(response)
            except httpx.TransportError as error:
                if not (is_safe or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)) or left == 0:
                    raise Unreachable(error) from error
            await self._sleep(asked if asked is not None else pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)
        raise AssertionError("the last attempt returns or raises")


class SyncConnection(Connection):
    """Blocking I/O. Close it, or use it in a `with` block."""

    _client = httpx.Client
    _http: httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    async def _send_once(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        return self._http.send(request, stream=stream)

    async def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def _chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        for chunk in response.iter_bytes():
            yield chunk

    async def _close_response(self, response: httpx.Response) -> None:
        response.close()

    def _content(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        return pieces

    async def _off_loop(self, work: Callable[[], object]) -> None:
        work()

    @asynccontextmanager
    async def _meanwhile(
        self, look: Callable[[], Coroutine[Any, Any, None]] | None, seconds: float
    ) -> AsyncIterator[None]:
        if look is None:
            yield
            return
        ended = threading.Event()

        def run_looks() -> None:
            while not ended.wait(seconds):
                run(look())

        thread = threading.Thread(target=run_looks, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class AsyncConnection(Connection):
    """I/O on asyncio's event loop. Close it, or use it in an `async with` block."""

    _client = httpx.AsyncClient
    _http: httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def _send_once(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        return await self._http.send(request, stream=stream)

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def _chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        return response.aiter_bytes()

    async def _close_response(self, response: httpx.Response) -> None:
        await response.aclose()

    async def _content(self, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
        while piece := await asyncio.to_thread(next, pieces, b""):
            yield piece

    async def _off_loop(self, work: Callable[[], object]) -> None:
        await asyncio.to_thread(work)

    @asynccontextmanager
    async def _meanwhile(
        self, look: Callable[[], Coroutine[Any, Any, None]] | None, seconds: float
    ) -> AsyncIterator[None]:
        ended = asyncio.Event()

        async def run_looks() -> None:
            while look is not None and not ended.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), seconds)
                    return
                await look()

        looks = asyncio.create_task(run_looks())
        try:
            yield
        finally:
            ended.set()
            await looks


def run(coroutine: Coroutine[Any, Any, R]) -> R:
    """The result of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return cast(R, done.value)
    finally:
        coroutine.close()
    raise RuntimeError("a coroutine of the synchronous client was suspended")


def iterate(items: AsyncGenerator[R]) -> Iterator[R]:
    """The items of an asynchronous generator that never suspends."""
    try:
        while True:
            yield run(items.asend(None))
    except StopAsyncIteration:
        pass
    finally:
        run(items.aclose())


class call(Generic[P, S, A]):  # noqa: N801  # a decorator
    """A method of both clients: a coroutine function is a plain one in the synchronous client, a generator a plain generator."""

    @overload
    def __init__(
        self: "call[P, R, Coroutine[Any, Any, R]]", method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]
    ) -> None: ...
    @overload
    def __init__(
        self: "call[P, Iterator[R], AsyncIterator[R]]", method: Callable[Concatenate[Any, P], AsyncGenerator[R]]
    ) -> None: ...
    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: SyncConnection, owner: type) -> Callable[P, S]: ...
    @overload
    def __get__(self, client: AsyncConnection, owner: type) -> Callable[P, A]: ...
    def __get__(self, client: Connection | None, owner: type) -> Callable[..., Any]:
        method = self._method.__get__(client, owner)

        @wraps(method)
        def blocking(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return iterate(result) if isinstance(result, AsyncGenerator) else run(result)

        return blocking if isinstance(client, SyncConnection) else cast(Callable[..., Any], method)


def _may_succeed(response: httpx.Response, refusal: WinnowError) -> bool:
    """Whether the same request is worth retrying soon."""
    if response.headers.get("x-should-retry") == "false" or (_retry_after(response) or 0) > _MAX_PAUSE_SECONDS:
        return False
    return response.status_code in _RETRY_STATUSES or refusal.code == "idempotency_key_in_use"


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the service asks to wait; it never sends the other form, a date."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _refusal(response: httpx.Response, body: bytes) -> WinnowError:
    """The error of a response: the service's problem details, or the response of a proxy in between."""
    if not response.headers.get("Content-Type", "").startswith("application/problem+json"):
        text = body[:200].decode(errors="replace")
        return WinnowError(response.status_code, "http_error", f"{response.status_code} {text}")
    problem = json.loads(body)
    names = ("param", "errors", "request_id")
    return WinnowError(
        response.status_code, problem["code"], problem["detail"], **{name: problem.get(name) for name in names}
    )
