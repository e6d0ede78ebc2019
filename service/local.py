"""The embedded stack: PostgreSQL, Valkey, the API and workers under one process, with all state in one folder.

    python -m service.local --home .winnow --port 8000 --workers 1

It stops everything it started on SIGTERM or SIGINT, and when its stdin closes if asked to watch it. Started in a session of
its own (`StackProcess` below does), a Ctrl-C in the terminal reaches only the command in front, which then stops the stack:
so no moment of the start leaves a process behind.
"""

import argparse
import contextlib
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from service.processes import (
    START_SECONDS,
    STOP_SECONDS,
    Parts,
    Restarts,
    StackError,
    free_port,
    start_postgres,
    start_valkey,
    wait_for,
)

__all__ = ["MODEL_NAME", "Stack", "StackError", "StackProcess", "running_stack", "serve", "stop_stack"]

log = logging.getLogger("winnow.local")

MODEL_NAME = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class Stack:
    """Where a running stack answers, as written to `stack.json` once it is ready."""

    url: str
    api_key: str
    database_url: str
    broker_url: str
    home: str
    pids: dict[str, int]


def running_stack(home: Path) -> Stack | None:
    """The stack that runs from this folder, or None."""
    try:
        stack = Stack(**json.loads((home / "stack.json").read_text()))
        return stack if httpx.get(f"{stack.url}/healthz", timeout=5).is_success else None
    except (OSError, ValueError, TypeError, httpx.HTTPError):
        return None


def _kept_secret(path: Path, make: Callable[[], str]) -> str:
    """The content of a private file, made on first use."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(make())
    return path.read_text()


def _environment(home: Path, database_url: str, broker_url: str, workers: int) -> dict[str, str]:
    """The settings of API and workers; whatever the caller's environment sets stays."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # The hub as a whole: who starts it is who posts to it.
    defaults = {"WINNOW_WORKER__THREADS": str(max(1, cores // workers)), "WINNOW_MODELS__HUB": '["*/*"]'}
    return {
        **{name: value for name, value in defaults.items() if name not in os.environ},
        "WINNOW_DATABASE__URL": database_url,
        "WINNOW_BROKER__URL": broker_url,
        "WINNOW_ARTIFACTS__URL": str(home / "artifacts"),
        "WINNOW_MODELS__FOLDER": str(home / "models"),
        "WINNOW_SECRET_KEY": _kept_secret(home / "secret_key", lambda: secrets.token_hex(32)),
    }


def _own_port(number: int) -> dict[str, str]:
    """Prometheus reads the first worker at the port that is set, each other one at the next."""
    port = os.environ.get("WINNOW_WORKER__METRICS_PORT", "0")
    return {"WINNOW_WORKER__METRICS_PORT": str(int(port) + number - 1)} if port.isdecimal() and int(port) else {}


def _make_key(home: Path, database_url: str, secret_key: str) -> str:
    from service.database import make_engine, make_sessions
    from service.settings import DatabaseSettings
    from service.tenants.caller import Scope
    from service.tenants.service import create_key

    engine = make_engine(DatabaseSettings(url=database_url))
    try:
        with make_sessions(engine).begin() as session:
            # The key is written only if its row is: the file is made inside the transaction.
            return _kept_secret(
                home / "api_key",
                lambda: create_key(
                    session, tenant_name="local", key_name="winnow up", secret_key=secret_key, scopes=tuple(Scope)
                ),
            )
    finally:
        engine.dispose()


def _start(home: Path, port: int, workers: int, parts: Parts, stopping: threading.Event) -> Stack:
    """Starts the parts in order; between two of them it looks whether it is to stop."""
    from service.schema import upgrade

    for folder in ("logs", "artifacts", "models"):
        (home / folder).mkdir(exist_ok=True)
    database_url = start_postgres(home, parts)
    _check(stopping)
    broker_url = start_valkey(home, parts)
    upgrade(database_url)
    environment = _environment(home, database_url, broker_url, workers)
    api_key = _make_key(home, database_url, environment["WINNOW_SECRET_KEY"])
    _check(stopping)
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    if _is_taken(port):
        raise StackError(f"port {port} is in use; choose another with --port")
    api = [sys.executable, "-m", "uvicorn", "service.app:create_app", "--factory", "--host", "127.0.0.1"]
    parts.spawn("api", [*api, "--port", str(port), "--no-access-log"], environment)
    for number in range(1, workers + 1):
        celery = [sys.executable, "-m", "celery", "-A", "worker.celery_app", "worker", "-P", "threads", "-c", "1"]
        quiet = ["--without-gossip", "--without-mingle", "--loglevel", "INFO", "-n", f"worker{number}@winnow"]
        parts.spawn(f"worker{number}", [*celery, *quiet], {**environment, **_own_port(number)})
    wait_for("api", parts, lambda: stopping.is_set() or _is_ready(url))
    _check(stopping)
    return Stack(url, api_key, database_url, broker_url, str(home), dict(parts.pids))


class _StopRequested(Exception):
    pass


def _check(stopping: threading.Event) -> None:
    if stopping.is_set():
        raise _StopRequested


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).is_success
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    with (home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackError(
                f"a stack already runs from {home}; stop it, or choose another folder with --home"
            ) from error
        yield


def serve(home: Path, port: int, workers: int, stopping: threading.Event) -> None:
    """Runs the stack until `stopping` is set.

    Raises:
        StackError: a part did not start, or ended by itself.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    with _only_one(home):
        parts = Parts(home)
        try:
            stack = _start(home, port, workers, parts, stopping)

            def publish() -> None:
                _publish(home / "stack.json", asdict(replace(stack, pids=dict(parts.pids))))

            publish()
            _watch(parts, stopping, publish)
        except _StopRequested:
            log.info("stopped while starting")
        finally:
            (home / "stack.json").unlink(missing_ok=True)
            parts.stop()


def stop_stack(home: Path) -> None:
    """Stops the stack that runs from this folder; returns once all of it has ended.

    Raises:
        StackError: none runs from it, or it has not ended in time.
    """
    stack = running_stack(home)
    if stack is None:
        raise StackError(f"no stack runs from {home}")
    seconds = STOP_SECONDS * len(stack.pids)
    deadline = time.monotonic() + seconds
    os.kill(stack.pids["stack"], signal.SIGTERM)
    while True:
        # It holds the lock until its last part has ended.
        with contextlib.suppress(StackError), _only_one(home):
            return
        if time.monotonic() > deadline:
            raise StackError(f"the stack has not ended after {seconds:.0f} seconds; see {home / 'stack.log'}")
        time.sleep(0.1)


def _publish(path: Path, stack: dict[str, Any]) -> None:
    partial = path.with_suffix(".part")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(stack, file)
    partial.rename(path)


def _watch(parts: Parts, stopping: threading.Event, changed: Callable[[], None]) -> None:
    """Waits. A worker that ends is started again (its units are taken by others meanwhile), any other part ends the stack."""
    restarts = {name: Restarts(time.monotonic()) for name in parts.processes}
    while not stopping.wait(0.5):
        for name, process in list(parts.processes.items()):
            if process.poll() is None:
                continue
            if not name.startswith("worker"):
                raise StackError(f"{name} ended with status {process.returncode}; see logs/{name}.log")
            pause = restarts[name].ended(time.monotonic())
            if pause is not None:
                log.warning(
                    "%s ended with status %s; starting it again in %.0f s; see logs/%s.log",
                    *(name, process.returncode, pause, name),
                )
            elif restarts[name].is_due(time.monotonic()):
                parts.start_again(name)
                changed()


class StackProcess:
    """A stack in a process and session of its own. It ends by `stop`, and with this process unless it is to `outlive` it."""

    def __init__(self, home: Path, *, port: int, workers: int, outlive: bool = False) -> None:
        self.home = home.resolve()
        self.home.mkdir(parents=True, exist_ok=True)
        self._log = self.home / "stack.log"
        command = [sys.executable, "-m", "service.local", "--home", str(self.home), "--port", str(port)]
        command += ["--workers", str(workers), *([] if outlive else ["--watch-stdin"])]
        with self._log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if outlive else subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> Stack:
        """The stack, once it answers.

        Raises:
            StackError: it did not start.
        """
        deadline = time.monotonic() + 2 * START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            stack = running_stack(self.home)
            if stack is not None:
                return stack
            time.sleep(0.1)
        last = self._log.read_text(errors="replace").strip().splitlines()
        raise StackError(f"the stack did not start: {last[-1] if last else 'no message'} (log: {self._log})")

    def wait(self) -> int:
        """Until it ends by itself."""
        return self._process.wait()

    def stop(self) -> None:
        """Stops everything and waits for it; safe to call at any moment and more than once."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded stack")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--watch-stdin", action="store_true", help="stop when stdin closes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    if arguments.watch_stdin:

        def watch() -> None:
            sys.stdin.read()
            stopping.set()

        threading.Thread(target=watch, daemon=True).start()
    try:
        serve(arguments.home, arguments.port, arguments.workers, stopping)
    except StackError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
