"""Requests at a fixed rate, whatever the answers do (an open loop): how long each took since it was due."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import psutil
import uvloop

Json = dict[str, Any]
Request = Callable[[int], bytes]
Job = tuple[str, str]  # the key that it belongs to, and its id

CONNECTIONS = 256
"""Kept open; a request that finds all of them busy waits, and its time runs."""
WARM_UP_SECONDS = 3.0


def at_rate(url: str, request: Request, rate: int, seconds: float, expected: int = 200) -> Json:
    """Sends `rate` requests a second, after a warm-up as fast. Percentiles are milliseconds from when a request was due to the
    last byte of its answer. How fast the machine was, which other guests of a shared host change from minute to minute, tells a
    loop of always the same length that is timed before and after."""
    before = _loop_milliseconds()
    psutil.cpu_percent()
    found = uvloop.run(_at_rate(url, request, rate, seconds, expected))
    busy = round(psutil.cpu_percent() / 100, 2)
    return {**found, "machine_busy": busy, "loop_ms": [before, _loop_milliseconds()]}


def _loop_milliseconds() -> int:
    begin, total = time.perf_counter(), 0
    for number in range(2_000_000):
        total += number
    return round(1000 * (time.perf_counter() - begin))


async def _at_rate(url: str, request: Request, rate: int, seconds: float, expected: int) -> Json:
    host, port = url.removeprefix("http://").split(":")
    idle: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
    for _ in range(CONNECTIONS):
        idle.put_nowait(Connection(host, int(port)))
    loop, took, statuses = asyncio.get_running_loop(), list[float](), Counter[str]()
    begin = loop.time() + 0.1
    warm_up, count = round(WARM_UP_SECONDS * rate), round((WARM_UP_SECONDS + seconds) * rate)

    async def one(number: int, due: float) -> None:
        connection = await idle.get()
        try:
            status = await connection.status_of(request(number))
        except (OSError, asyncio.IncompleteReadError) as error:
            status = type(error).__name__
            connection.close()
        idle.put_nowait(connection)
        if number >= warm_up:
            took.append(loop.time() - due)
            statuses[status] += 1

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            due = begin + number / rate
            if (ahead := due - loop.time()) > 0:
                await asyncio.sleep(ahead)
            group.create_task(one(number, due))
    lasted = loop.time() - begin - WARM_UP_SECONDS
    while not idle.empty():
        idle.get_nowait().close()
    p50, p99 = 1000 * np.percentile(took, [50, 99])
    errors = {status: number for status, number in statuses.items() if status != str(expected)}
    figures = {"p50": round(float(p50), 1), "p99": round(float(p99), 1), "max": round(1000 * max(took), 1)}
    return {"rate": rate, "answered_a_second": round(len(took) / lasted, 1), **figures, "errors": errors}


WAIT_SECONDS = 30


def until_ended(url: str, jobs: Sequence[Job], clients: int, seconds: float) -> Json:
    """Clients that wait for one job each (`?wait=30`, again and again), and for the next of `jobs` once it has ended, by someone
    else meanwhile. They begin over as long as a wait takes. Percentiles are milliseconds from the end of a job to the
    last byte of the answer that says so."""
    return uvloop.run(_until_ended(url, jobs, clients, seconds))


async def _until_ended(url: str, jobs: Sequence[Job], clients: int, seconds: float) -> Json:
    host, port = url.removeprefix("http://").split(":")
    loop, following = asyncio.get_running_loop(), iter(jobs)
    warm_up = min(WAIT_SECONDS, seconds)
    counting_from = loop.time() + warm_up
    until = counting_from + seconds
    took, statuses = list[float](), Counter[str]()

    async def client(number: int) -> None:
        await asyncio.sleep(warm_up * number / clients)
        connection, (key, job) = Connection(host, int(port)), next(following)
        while loop.time() < until:
            head = f"GET /v1/selection-jobs/{job}?wait={WAIT_SECONDS} HTTP/1.1\r\nHost: api\r\n"
            head += f"Authorization: Bearer {key}\r\n\r\n"
            try:
                status, content = await connection.answer(head.encode())
            except (OSError, asyncio.IncompleteReadError) as error:
                status, content = type(error).__name__, b"{}"
                connection.close()
            ended = json.loads(content).get("finished_at")
            if counting_from <= loop.time() < until:
                statuses[status] += 1
                if ended is not None:
                    took.append((datetime.now(UTC) - datetime.fromisoformat(ended)).total_seconds())
            if ended is not None:
                key, job = next(following)
        connection.close()

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    await asyncio.sleep(until - loop.time())
    for task in tasks:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [error for error in found if error is not None and not isinstance(error, asyncio.CancelledError)]
    if failed:
        raise ExceptionGroup("clients that wait", [error for error in failed if isinstance(error, Exception)])
    p50, p99 = 1000 * np.percentile(took, [50, 99])
    errors = {status: number for status, number in statuses.items() if status != "200"}
    figures = {"p50": round(float(p50), 1), "p99": round(float(p99), 1), "max": round(1000 * max(took), 1)}
    return {"clients": clients, "told_a_second": round(len(took) / seconds, 1), **figures, "errors": errors}


class Connection:
    """One that is kept open, and opened when it is first needed."""

    def __init__(self, host: str, port: int) -> None:
        self._where = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def status_of(self, request: bytes) -> str:
        return (await self.answer(request))[0]

    async def answer(self, request: bytes) -> tuple[str, bytes]:
        """The status and the body."""
        if self._streams is not None and self._streams[0].at_eof():  # closed by the server, as it was idle for seconds
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._where)
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        content = await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        return head.split()[1].decode(), content

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
