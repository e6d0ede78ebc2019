"""Requests with one API key: which of them are retried, and how an answer is read."""

import asyncio
import random
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Self, TypeVar

import httpx
from pydantic import PrivateAttr, ValidationError

from winnow.address import resolve
from winnow.answers.base import Answer
from winnow.errors import UnexpectedAnswer, Unreachable, WinnowError, refusal
from winnow.twins import Blocking, NonBlocking, run
from winnow.version import user_agent

Json = dict[str, Any]
M = TypeVar("M", bound=Answer)

_RETRY_STATUSES = frozenset({429, 502, 503, 504})
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 30.0


class _Page(Answer):
    data: list[Any]
    has_more: bool
    last_id: str | int | None


class Handle(Answer):
    """An answer that has calls of its own."""

    _client: Any = PrivateAttr(None)


class Connection(ABC):
    """What both clients share. The abstract methods are all that differs between blocking and asynchronous I/O.

    A GET, a PUT, and a POST (it carries an `Idempotency-Key`), is retried when the connection fails, where the service says so
    (`x-should-retry`) and, where it says nothing, after 429, 502, 503 and 504; not where it asks for more than half a minute
    (`Retry-After`). Any other call is retried only where no connection could be made: otherwise it may have been carried out.

    The key is sent to the origin of the URL and to no other: redirects are not followed.
    """

    _http: Any  # of the type `_client`
    _client: type[httpx.Client] | type[httpx.AsyncClient]

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        transport: Any = None,
    ) -> None:
        """Opens no connection yet.

        Args:
            url: None: `WINNOW_URL`, else the service that `winnow login` was last called for, else the stack that runs from
                `.winnow` of this folder.
            api_key: None: `WINNOW_API_KEY`, else what `winnow login` has stored for this URL, or the running stack's own.
            timeout: seconds without progress after which a request counts as failed.
            retries: attempts after the first.
            transport: an httpx transport of the client's kind, for a proxy or for tests.

        Raises:
            NoAddress: no URL, or no key for it, is given or stored.
        """
        address = resolve(url, api_key)
        self._retries = retries
        self._http = self._client(
            base_url=f"{address.url}/v1",
            headers={"Authorization": f"Bearer {address.api_key}", "User-Agent": user_agent()},
            timeout=timeout,
            transport=transport,
            follow_redirects=False,
        )

    @property
    def url(self) -> str:
        """Of the service."""
        return str(self._http.base_url).removesuffix("/v1/")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"  # without the key

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

    async def _pages(self, kind: type[M], path: str, **params: Any) -> AsyncGenerator[M]:
        """The entries of all pages; parameters that are None are left out."""
        given = {name: value for name, value in params.items() if value is not None}
        page = await self._one(_Page, "GET", path, params=given)
        for entry in page.data:
            yield self._read(kind, entry)
        while page.has_more:
            page = await self._one(_Page, "GET", path, params={**given, "after": page.last_id})
            for entry in page.data:
                yield self._read(kind, entry)

    async def _one(self, kind: type[M], method: str, path: str, **options: Any) -> M:
        """The answer to a call."""
        return self._read(kind, (await self._call(method, path, **options)).content)

    def _held(self, seconds: float) -> httpx.Timeout:
        """Of a request that the service holds for so long."""
        usual = self._http.timeout
        return httpx.Timeout(usual.connect, read=None if usual.read is None else usual.read + seconds)

    def _read(self, kind: type[M], value: bytes | Json) -> M:
        """An answer, from JSON or of what JSON means.

        Raises:
            UnexpectedAnswer: it is none.
        """
        try:
            answer = kind.model_validate_json(value) if isinstance(value, bytes) else kind.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            advice = "Is this the URL of a Winnow service? A client of its version reads its answers."
            detail = f"{self.url} answered what is no {kind.__name__}: {where}: {first['msg']}. {advice}"
            raise UnexpectedAnswer(None, "unexpected_answer", detail) from error
        if isinstance(answer, Handle):
            answer._client = self
        return answer

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
                error = refusal(response, body)
                if not is_safe or not _may_succeed(response, error) or left == 0:
                    raise error
                asked = error.retry_after
            except httpx.TransportError as lost:
                if not (is_safe or isinstance(lost, httpx.ConnectError | httpx.ConnectTimeout)) or left == 0:
                    raise Unreachable(lost) from lost
            await self._sleep(asked if asked is not None else pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)
        raise AssertionError("the last attempt returns or raises")


class SyncConnection(Connection, Blocking):
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


class AsyncConnection(Connection, NonBlocking):
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


def _may_succeed(response: httpx.Response, error: WinnowError) -> bool:
    """Whether the same request is worth retrying soon: as the service says, else by the status."""
    if (error.retry_after or 0) > _MAX_PAUSE_SECONDS:
        return False
    advice = response.headers.get("x-should-retry")
    return advice == "true" if advice in ("true", "false") else response.status_code in _RETRY_STATUSES
