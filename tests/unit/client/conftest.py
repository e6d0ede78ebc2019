"""The client under test: each test runs with the synchronous and with the asynchronous one, and neither sleeps."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.scripted_server import Blocking, Connect, Server

from winnow import AsyncWinnow, Winnow


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """A context manager with a client of the server that it is given."""

    @contextmanager
    def connected(server: Server, **options: Any) -> Iterator[Any]:
        address = "http://winnow.test/", "wnw_key"
        if request.param == "sync":
            with Winnow(*address, transport=server, **options) as client:
                yield client
        else:
            with asyncio.Runner() as runner:
                client = AsyncWinnow(*address, transport=server, **options)
                runner.run(client.__aenter__())
                yield Blocking(client, runner)
                runner.run(client.__aexit__(None, None, None))

    return connected


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clients do not sleep; how long they would have is kept here."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("winnow.transport.time.sleep", slept.append)
    monkeypatch.setattr("winnow.transport.asyncio.sleep", sleep)
    return slept
