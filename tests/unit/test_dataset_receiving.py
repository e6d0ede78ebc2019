"""The body of an upload is cut off at the budget, whatever its sender says of its length."""

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from service.datasets.receiving import received
from service.http.errors import BadRequest, TooLarge
from service.settings import UploadSettings

FORM = "multipart/form-data; boundary=x"
FORM_START = b'--x\r\nContent-Disposition: form-data; name="file"; filename="pool.jsonl"\r\n\r\n'


class Sender:
    """Sends the chunks one by one and counts those that were asked for."""

    def __init__(
        self, chunks: list[bytes], headers: dict[str, str], *, breaks_off: bool = False, falls_silent: bool = False
    ) -> None:
        self.asked, self.name = 0, ""
        self._chunks, self._breaks_off, self._falls_silent = chunks, breaks_off, falls_silent
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.request = Request({"type": "http", "method": "POST", "headers": raw}, self._receive)

    async def _receive(self) -> dict[str, Any]:
        if self._falls_silent and self.asked == len(self._chunks):
            await asyncio.Event().wait()
        if self.asked == len(self._chunks):
            return {"type": "http.disconnect"} if self._breaks_off else {"type": "http.request", "body": b""}
        self.asked += 1
        return {"type": "http.request", "body": self._chunks[self.asked - 1], "more_body": True}

    def receive(self, max_bytes: int, **limits: float) -> bytes:
        async def read() -> bytes:
            async with received(self.request, UploadSettings(max_bytes=max_bytes, **limits)) as (file, self.name):
                file.seek(0)
                return file.read()

        return asyncio.run(read())


def test_a_body_of_the_budgets_size_is_received() -> None:
    assert Sender([b"ab", b"", b"cd"], {"content-length": "4"}).receive(4) == b"abcd"
    large = [b"x" * 700_000] * 4
    assert Sender(large, {}).receive(2_800_000) == b"".join(large)


def test_a_form_gives_its_file() -> None:
    sender = Sender([FORM_START, b"ab", b"cd\r\n--x--\r\n"], {"content-type": FORM})
    assert (sender.receive(1000), sender.name) == (b"abcd", "pool.jsonl")


def test_an_announced_excess_is_refused_before_reading() -> None:
    sender = Sender([b"abcde"], {"content-length": "5"})
    with pytest.raises(TooLarge):
        sender.receive(4)
    assert sender.asked == 0


@pytest.mark.parametrize("headers", [{}, {"content-length": "4"}, {"content-type": FORM}])
def test_an_excess_that_was_not_announced_is_refused_where_it_begins(headers: dict[str, str]) -> None:
    sender = Sender([FORM_START, *[b"a" * 100] * 1000], headers)
    with pytest.raises(TooLarge, match="larger than 1,000 bytes"):
        sender.receive(1000)
    assert sender.asked == 11


@pytest.mark.parametrize("headers", [{}, {"content-type": FORM}])
def test_a_body_that_breaks_off_is_the_senders_fault(headers: dict[str, str]) -> None:
    with pytest.raises(BadRequest, match="aborted"):
        Sender([FORM_START, b"abc"], headers, breaks_off=True).receive(1000)


@pytest.mark.parametrize("headers", [{}, {"content-type": FORM}])
def test_a_sender_who_falls_silent_is_not_waited_for(headers: dict[str, str]) -> None:
    with pytest.raises(BadRequest, match=r"No data arrived for 0\.05 seconds"):
        Sender([FORM_START, b"abc"], headers, falls_silent=True).receive(1000, idle_seconds=0.05)


@pytest.mark.parametrize("headers", [{"content-type": "multipart/form-data"}, {"content-type": FORM}])
def test_a_malformed_form_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(BadRequest, match="named `file`"):
        Sender([b"no form"], headers).receive(1000)
