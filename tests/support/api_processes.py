"""Several API processes that share a port, each of which a test can speak to."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import psutil

from service.settings import ApiSettings
from support.processes import Process, running
from support.servers import free_port
from support.waiting import until


@dataclass(frozen=True)
class ApiProcesses:
    first: Process
    url: str
    count: int

    @classmethod
    @contextmanager
    def made(cls, settings: ApiSettings, folder: Path, count: int = 2, **environment: str) -> Iterator[Self]:
        port = free_port()
        with running(Process.apis(settings, port, folder / "api.log", count, **environment)) as first:
            found = cls(first, f"http://127.0.0.1:{port}", count)
            found.wait_ready()
            yield found

    @property
    def pids(self) -> list[int]:
        """Of those that serve; not of the helper that multiprocessing starts."""
        found = []
        for child in psutil.Process(self.first.pid).children():
            with suppress(psutil.Error):  # it has just ended
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child.pid)
        return sorted(found)

    def wait_ready(self) -> list[int]:
        """Until there are as many as there should be, and the port answers; their numbers."""

        def ready() -> bool:
            assert self.first.is_alive, self.first.log.read_text()[-3000:]
            with suppress(httpx.TransportError):
                return len(self.pids) == self.count and httpx.get(f"{self.url}/healthz").is_success
            return False

        until("all processes run", ready)
        return self.pids

    @contextmanager
    def client(self, pid: int, key: str = "", seconds: float = 60.0) -> Iterator[httpx.Client]:
        """A client whose connection this process has accepted, since the others stood still, for as long as it was starting."""
        others = [other for other in self.pids if other != pid]
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=1, keepalive_expiry=None)
        with httpx.Client(base_url=self.url, headers=headers, timeout=seconds, limits=limits) as client:
            for other in others:
                os.kill(other, signal.SIGSTOP)
            try:
                assert client.get("/healthz").is_success
            finally:
                for other in others:
                    os.kill(other, signal.SIGCONT)
            yield client
