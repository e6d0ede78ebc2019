"""What a thread does that waits for others, seen as it does it: on which thread, and within which transaction. No clock is read,
so that a slow machine finds what a fast one finds."""

import hashlib
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from sqlalchemy import event
from sqlalchemy.orm import Session

from service.storage.artifacts import ArtifactStore

Note = Callable[[str], None]

ROOT = Path(__file__).parents[2]
NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"}
DISK = {"open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"}
PROCESSES = {"subprocess.Popen", "os.system", "os.posix_spawn"}
STORE = ("exists", "size", "modified", "touch", "open", "read_json", "write_json", "writing", "local", "delete")
LARGE = 2**18  # bytes that are hashed at once

_hooks: list[Callable[[str, tuple[Any, ...]], None]] = []
_request: ContextVar["set[Session] | None"] = ContextVar("transactions_of_a_request", default=None)


def _audit(name: str, arguments: tuple[Any, ...]) -> None:
    for hook in _hooks:
        hook(name, arguments)


@contextmanager
def audited(hook: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    if not hasattr(sys, "_winnow_tests_audit"):
        sys._winnow_tests_audit = True  # type: ignore[attr-defined]  # a hook cannot be removed again
        sys.addaudithook(_audit)
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


def place() -> str:
    """The innermost line of ours that is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and "tests" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "libraries"


def _imports() -> bool:
    """Whether a module is being imported, or a line of source looked up, which happens once."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib") or frame.f_code.co_filename.endswith(
            "linecache.py"
        ):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def spy(patch: pytest.MonkeyPatch, owner: Any, name: str, note: Callable[..., None]) -> None:
    wrapped = getattr(owner, name)

    def noted(*args: Any, **options: Any) -> Any:
        note(*args)
        return wrapped(*args, **options)

    patch.setattr(owner, name, noted)


def _spy_on_sockets(patch: pytest.MonkeyPatch, note: Note) -> None:
    """Also of connections that were there before; those that do not wait, as of an event loop, do not count."""
    for name in ("send", "sendall", "recv", "recv_into"):
        spy(patch, socket.socket, name, lambda of, *_, n=name: of.gettimeout() != 0 and note(f"socket.{n}"))
    spy(patch, redis.Connection, "send_packed_command", lambda *_: note("a command to the broker"))


class LoopWatch:
    """An ASGI application around another one, which notes what blocks the thread of its event loop: files, processes, servers,
    statements to the database, sleep, and the hashing of much at once. What waits for the loop's own locks it does not see."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._thread: int | None = None
        self.requests = 0
        self.found: set[str] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self._thread = threading.get_ident()
            self.requests += 1
        await self._app(scope, receive, send)

    def note(self, what: str) -> None:
        if threading.get_ident() == self._thread:
            self.found.add(f"{what} in {place()}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        def hook(name: str, arguments: tuple[Any, ...]) -> None:
            seen = name in NETWORK | DISK | PROCESSES
            if seen and threading.get_ident() == self._thread and not _imports():
                self.note(f"{name} {str(arguments[0])[-80:]}")

        with pytest.MonkeyPatch.context() as patch, audited(hook):
            _spy_on_sockets(patch, self.note)
            for owner, name in ((psycopg.Connection, "wait"), (time, "sleep")):
                spy(patch, owner, name, lambda *_, n=name: self.note(n))
            spy(patch, psycopg, "connect", lambda *_: self.note("psycopg.connect"))
            for name in ("sha256", "md5", "blake2b"):
                spy(patch, hashlib, name, self._hashed)
            try:
                yield
            finally:
                self._thread = None  # its end may block

    def _hashed(self, content: Any = b"", *_: Any) -> None:
        if len(content) > LARGE:
            self.note(f"{len(content)} bytes hashed")


class TransactionWatch:
    """Notes calls to other servers, and to the artifact store, which may be one, while a transaction of SQLAlchemy is open: of
    the same request, whichever thread it goes on in (where the application is served through `around`), or else of the thread."""

    def __init__(self) -> None:
        self._of_threads: defaultdict[int, set[Session]] = defaultdict(set)
        self.transactions = self.calls = 0
        self.found: set[str] = set()

    def around(self, app: Any) -> Any:
        async def watched(scope: Any, receive: Any, send: Any) -> None:
            token = _request.set(set())
            try:
                await app(scope, receive, send)
            finally:
                _request.reset(token)

        return watched

    def _open(self) -> set[Session]:
        of_request = _request.get()
        return self._of_threads[threading.get_ident()] if of_request is None else of_request

    def note(self, what: str) -> None:
        self.calls += 1
        if self._open():
            self.found.add(f"{what} in {place()}")

    @contextmanager
    def watching(self, *, store: bool = True) -> Iterator[None]:
        homes: dict[Session, set[Session]] = {}

        def began(session: Session, *_: Any) -> None:
            self.transactions += 1
            homes[session] = self._open()
            homes[session].add(session)

        def ended(session: Session, transaction: Any) -> None:
            if transaction.parent is None and session in homes:
                homes.pop(session).discard(session)

        def hook(name: str, arguments: tuple[Any, ...]) -> None:
            if name in NETWORK:
                self.note(f"{name} {arguments[-1]}")

        event.listen(Session, "after_begin", began)
        event.listen(Session, "after_transaction_end", ended)
        try:
            with pytest.MonkeyPatch.context() as patch, audited(hook):
                _spy_on_sockets(patch, self.note)
                for name in STORE if store else ():
                    spy(patch, ArtifactStore, name, lambda *_, n=name: self.note(f"store.{n}"))
                yield
        finally:
            event.remove(Session, "after_begin", began)
            event.remove(Session, "after_transaction_end", ended)
