"""The transport that joins what is written within one turn of the loop."""

import asyncio
from typing import Any

import pytest

from service.http import protocol


class Transport:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def write(self, data: bytes) -> None:
        self.seen.append(data)

    def close(self) -> None:
        self.seen.append("closed")

    def is_closing(self) -> bool:
        return "closed" in self.seen


async def joined(transport: Transport) -> Any:
    return protocol._OneWrite(transport, asyncio.get_running_loop())  # type: ignore[arg-type]


def test_what_is_written_in_one_turn_is_one_write_in_order() -> None:
    async def written() -> list[Any]:
        transport = Transport()
        one = await joined(transport)
        for piece in (b"head", b"body"):
            one.write(piece)
        assert transport.seen == []
        await asyncio.sleep(0)
        one.write(b"next")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return transport.seen

    assert asyncio.run(written()) == [b"headbody", b"next"]


def test_closing_writes_what_is_held_first() -> None:
    async def closed() -> list[Any]:
        transport = Transport()
        one = await joined(transport)
        one.write(b"last words")
        one.close()
        assert one.is_closing()
        await asyncio.sleep(0)
        return transport.seen

    assert asyncio.run(closed()) == [b"last words", "closed"]


def test_a_stream_without_a_pause_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_MOST_HELD", 100)

    async def held() -> list[int]:
        transport = Transport()
        one = await joined(transport)
        unwritten = []
        for number in range(50):
            one.write(b"x" * 30)
            unwritten.append(30 * (number + 1) - sum(len(data) for data in transport.seen))
        return unwritten

    assert max(asyncio.run(held())) <= 100
