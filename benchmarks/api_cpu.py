"""Processor time of a request to the API, and of the same one to the least that could answer it (`minimal_api.py`), in turns.

Of the API and PostgreSQL, whichever machine they are on: unlike durations it depends little on what else runs there.
"""

import asyncio
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from api_rates import Request
from load_world import World, cpu_seconds, serving

Json = dict[str, Any]
CONNECTIONS, TURNS = 4, 3
JOBS = "/v1/selection-jobs"


def measure(world: World, code: Path, postgres: psutil.Process, body: Json, requests: int) -> Json:
    """Milliseconds a request by call, of the service and of the minimal one; and what the one costs more, as a factor.

    `requests` are made of each call in each turn; of submissions a tenth.
    """
    calls: dict[str, tuple[Request, int]] = {
        "poll": (polls(world), requests),
        "list of 20": (_get(world, lambda _: f"{JOBS}?limit=20"), requests // 4),
        "submission": (submissions(world, body), requests // 10),
    }
    found: dict[str, dict[str, list[tuple[float, float]]]] = {call: {"service": [], "minimal": []} for call in calls}
    for _ in range(TURNS):
        for name in ("service", "minimal"):
            with serving(world, code, 1, minimal=name == "minimal") as (url, api):
                for call, (request, count) in calls.items():
                    asyncio.run(_drive(url, request, count // 4))
                    before = cpu_seconds(api), cpu_seconds(postgres)
                    asyncio.run(_drive(url, request, count))
                    used = (cpu_seconds(api) - before[0], cpu_seconds(postgres) - before[1])
                    found[call][name].append((1000 * used[0] / count, 1000 * used[1] / count))
    return {call: _compared(**of_call) for call, of_call in found.items()}


def _compared(service: list[tuple[float, float]], minimal: list[tuple[float, float]]) -> Json:
    def milliseconds(turns: list[tuple[float, float]]) -> Json:
        return {"api": round(median(t[0] for t in turns), 3), "postgres": round(median(t[1] for t in turns), 3)}

    factor = median(sum(ours) / sum(least) for ours, least in zip(service, minimal, strict=True))
    return {"service_ms": milliseconds(service), "minimal_ms": milliseconds(minimal), "over_minimal": round(factor, 2)}


def polls(world: World) -> Request:
    """Of the running jobs of the tenant that has most, one after the other."""
    running = [job for key, job in world.running if key == world.keys[0]]
    return _get(world, lambda number: f"{JOBS}/{running[number % len(running)]}")


def _get(world: World, path: Callable[[int], str]) -> Request:
    head = f" HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer {world.keys[0]}\r\n\r\n"
    return lambda number: f"GET {path(number)}{head}".encode()


def submissions(world: World, body: Json) -> Request:
    content = json.dumps(body)
    head = f"POST {JOBS} HTTP/1.1\r\nHost: api\r\nAuthorization: Bearer {world.keys[0]}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n"
    return lambda _: f"{head}Idempotency-Key: {uuid.uuid4()}\r\n\r\n{content}".encode()


async def _drive(url: str, request: Request, count: int) -> None:
    host, port = url.removeprefix("http://").split(":")

    async def client() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for number in range(count // CONNECTIONS):
            writer.write(request(number))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
            content = await reader.readexactly(int(length))
            if head.split()[1] not in (b"200", b"202"):
                raise RuntimeError(content.decode())
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
