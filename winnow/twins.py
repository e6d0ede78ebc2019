"""How one method serves both clients: it is written as a coroutine, and each client runs it in its way.

In the synchronous client nothing that is awaited suspends, so that a coroutine reaches its end in a single step, without an event
loop (`run`).
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")  # what a method of the synchronous client returns
A = TypeVar("A")  # what one of the asynchronous client returns


class Blocking:
    """Its calls return their results."""


class NonBlocking:
    """Its calls are awaited, or iterated over with `async for`."""


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
    def __get__(self, client: Blocking, owner: type) -> Callable[P, S]: ...
    @overload
    def __get__(self, client: NonBlocking, owner: type) -> Callable[P, A]: ...
    def __get__(self, client: Blocking | NonBlocking | None, owner: type) -> Callable[..., Any]:
        method = self._method.__get__(client, owner)

        @wraps(method)
        def blocking(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return iterate(result) if isinstance(result, AsyncGenerator) else run(result)

        return blocking if isinstance(client, Blocking) else cast(Callable[..., Any], method)
