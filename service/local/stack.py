"""The embedded stack: PostgreSQL, Valkey, the API and workers under one process, with all state in one folder.

    python -m service.local.stack --home .winnow --port 8000 --workers 1 --api-processes 2

It says `ready` once it answers, and stops everything it started on SIGTERM or SIGINT, and with --watch-stdin when its stdin
closes. In a separate session (see `StackProcess`), a Ctrl-C in the terminal reaches only the command in the foreground, which
then stops the stack. If it is killed, the kernel ends its processes (on Linux), and the next `up` or `down` what is left. If it
fails, the last line that it prints says why.
"""

import argparse
import contextlib
import fcntl
import logging
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil

from service.local.process_group import (
    STOP_SECONDS,
    ManagedProcess,
    ProcessGroup,
    StackError,
    Stopped,
    cores,
    end_leftovers,
    free_port,
    parts,
    wait_while,
    write_private,
)
from service.local.servers import start_postgres, start_valkey
from winnow.stack import LOCK, STACK, Stack, is_in_use, running_stack

log = logging.getLogger("winnow.local")

MODEL_NAME = "smollm2-135m-instruct"
_READY = "ready"


def _persistent_secret(path: Path, make: Callable[[], str]) -> str:
    """The content of a private file, which is made on first use."""
    if not path.exists():
        write_private(path, make())
    return path.read_text()


def _environment(home: Path, database_url: str, broker_url: str, workers: int) -> dict[str, str]:
    """The settings of API and workers; those that are set in our own environment stay."""
    # The whole hub: the user who starts the stack is the one who posts jobs to it.
    defaults = {
        "WINNOW_WORKER__THREADS": str(max(1, cores() // workers)),
        "WINNOW_MODELS__HUB": '["*/*"]',
        "WINNOW_DATASETS__HUB": '["*/*"]',
    }
    return {
        **{name: value for name, value in defaults.items() if name not in os.environ},
        "WINNOW_DATABASE__URL": database_url,
        "WINNOW_BROKER__URL": broker_url,
        "WINNOW_ARTIFACTS__URL": str(home / "artifacts"),
        "WINNOW_MODELS__FOLDER": str(home / "models"),
        "WINNOW_SECRET_KEY": _persistent_secret(home / "secret_key", lambda: secrets.token_hex(32)),
    }


def _make_key(home: Path, database_url: str, secret_key: str) -> str:
    from service.auth.principal import Scope
    from service.db.engine import make_engine, make_sessions
    from service.keys.service import create_key
    from service.settings import DatabaseSettings

    engine = make_engine(DatabaseSettings(url=database_url))
    try:
        with make_sessions(engine).begin() as session:
            # The key is written only if its row is: the file is made inside the transaction.
            return _persistent_secret(
                home / "api_key",
                lambda: create_key(
                    session, tenant_name="local", key_name="winnow up", secret_key=secret_key, scopes=tuple(Scope)
                ),
            )
    finally:
        engine.dispose()


def login_address(stack: Stack, page: str = "/jobs") -> str:
    """Of a page, with a link that logs in once, within minutes; without one where the stack's key was revoked."""
    from service.auth.browsers import make_link
    from service.db.engine import make_engine, make_sessions
    from service.http.errors import Unauthorized
    from service.settings import DatabaseSettings

    engine = make_engine(DatabaseSettings(url=stack.database_url))
    try:
        with make_sessions(engine).begin() as session:
            link = make_link(session, stack.api_key, (stack.home / "secret_key").read_text())
    except Unauthorized:
        return f"{stack.url}{page}"
    finally:
        engine.dispose()
    return f"{stack.url}/login?link={link}&next={page}"


def _connections(workers: int, api_processes: int) -> int:
    """What all of it may take, and those that PostgreSQL keeps for superusers."""
    from service.db import budget
    from service.settings import DatabaseSettings

    pool_size = os.environ.get("WINNOW_DATABASE__POOL_SIZE", DatabaseSettings.model_fields["pool_size"].default)
    settings = DatabaseSettings(url="postgresql://", pool_size=pool_size)
    return budget.most(settings, api_processes=api_processes, workers=workers) + 3


def _start(home: Path, port: int, workers: int, api_processes: int, group: ProcessGroup) -> Stack:
    """Starts everything in order."""
    from service.db.migrate import MigrationError, upgrade

    port = free_port(port)
    for folder in ("artifacts", "models"):
        (home / folder).mkdir(exist_ok=True)
    database_url = start_postgres(home, group, _connections(workers, api_processes))
    broker_url = start_valkey(home, group)
    try:
        upgrade(database_url)
    except MigrationError as error:
        raise StackError(str(error)) from error
    environment = _environment(home, database_url, broker_url, workers)
    api_key = _make_key(home, database_url, environment["WINNOW_SECRET_KEY"])
    api = [sys.executable, "-m", "service.serve", "--port", str(port), "--processes", str(api_processes)]
    group.start(ManagedProcess("api", api, environment))
    metrics_port = os.environ.get("WINNOW_WORKER__METRICS_PORT", "0")
    for i in range(workers):
        own = environment
        if metrics_port.isdecimal() and int(metrics_port):  # Prometheus reads each worker at its own port
            own = {**environment, "WINNOW_WORKER__METRICS_PORT": str(int(metrics_port) + i)}
        celery = [sys.executable, "-m", "celery", "-A", "worker.celery_app", "worker", "-P", "threads", "-c", "1"]
        celery += ["--without-gossip", "--without-mingle", "--loglevel", "INFO", "-n", f"worker{i + 1}@winnow"]
        group.start(ManagedProcess(f"worker{i + 1}", celery, own))
    url = f"http://127.0.0.1:{port}"
    group.wait_until_answers("api", lambda: httpx.get(f"{url}/readyz", timeout=5).raise_for_status())
    return Stack(url=url, api_key=api_key, database_url=database_url, broker_url=broker_url, home=home)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Nobody else starts or runs a stack in the folder.

    Raises:
        StackError: somebody does; it says where that stack answers.
    """
    with (home / LOCK).open("a") as file:

        def is_taken() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

        if wait_while(is_taken, 1):  # a look whether it is in use takes the lock for a moment
            stack = running_stack(home)
            whose = f"the stack at {stack.url}" if stack else "a stack that is starting or stopping"
            remedy = f"stop it with `winnow down --home {shlex.quote(str(home))}`, or choose another folder with --home"
            raise StackError(f"{home} is in use by {whose}; {remedy}")
        yield


def serve(home: Path, port: int, workers: int, api_processes: int, stopping: threading.Event) -> None:
    """Runs the stack until `stopping` is set; what ends is started again.

    Raises:
        StackError: the folder is in use, or a process did not start or keeps ending.
        OSError: the folder cannot be used.
    """
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home):
        (home / "logs").mkdir(exist_ok=True)
        logging.basicConfig(
            filename=home / "logs" / "stack.log", level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
        )
        logging.captureWarnings(True)
        if left := end_leftovers(home):
            log.warning("ended what an earlier stack had left: %s", ", ".join(left))
        group = ProcessGroup(home, stopping)
        try:
            stack = _start(home, port, workers, api_processes, group)
            write_private(home / STACK, stack.model_dump_json())
            print(_READY, flush=True)
            while not stopping.wait(0.5):
                group.tend()
        except Stopped:
            pass
        except Exception as error:
            log.critical("the stack ends: %s", error, exc_info=not isinstance(error, StackError))
            raise
        finally:
            (home / STACK).unlink(missing_ok=True)
            group.stop()


def stop_stack(home: Path) -> None:
    """Stops the stack that runs from this folder, or ends what is left of one; returns once all of it has ended.

    Raises:
        StackError: none runs from it, it cannot be told which process runs it, or it has not ended in time.
    """
    home = Path(os.path.realpath(home))
    was_running = is_in_use(home)
    if was_running:
        running = parts(home)
        if "stack" not in running:
            raise StackError(f"{home} is in use, but by no process that it names; stop the stack where it was started")
        seconds = STOP_SECONDS * len(running)
        with contextlib.suppress(psutil.NoSuchProcess):
            running["stack"].terminate()
        if wait_while(lambda: is_in_use(home), seconds):  # until its last part has ended
            raise StackError(f"the stack has not stopped after {seconds:.0f} seconds; see {home}/logs")
    elif not (home / LOCK).exists():
        raise StackError(f"no stack is running from {home}")
    with _locked(home):
        if not end_leftovers(home) and not was_running:
            raise StackError(f"no stack is running from {home}")


class StackProcess:
    """A stack in a separate process and session. It ends with `stop`, and with this process unless it is to `outlive` it."""

    def __init__(self, home: Path, *, port: int, workers: int, api_processes: int = 1, outlive: bool = False) -> None:
        self.home = Path(os.path.realpath(home))
        command = [sys.executable, "-m", "service.local.stack", "--home", str(self.home), "--port", str(port)]
        command += ["--workers", str(workers), "--api-processes", str(api_processes)]
        command += [] if outlive else ["--watch-stdin"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if outlive else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_ready(self) -> Stack:
        """The stack, once it answers.

        Raises:
            StackError: it did not start.
        """
        last = self._last_line(_READY)
        if last == _READY and (stack := running_stack(self.home)) is not None:
            return stack
        raise StackError(f"the stack did not start: {last}")

    def wait(self) -> None:
        """Returns when it has been stopped.

        Raises:
            StackError: it ended by itself.
        """
        last = self._last_line()
        if self._process.wait():
            raise StackError(f"the stack has stopped: {last}")

    def _last_line(self, wanted: str | None = None) -> str:
        """What it printed last, once it has ended or has printed the wanted line."""
        assert self._process.stdout is not None
        last = ""
        for line in self._process.stdout:
            last = line.strip()
            if last == wanted:
                return last
        status = self._process.wait()
        return last if last and status > 0 else f"it ended with status {status}"

    def stop(self) -> None:
        """Stops everything and waits for it; safe to call at any moment and more than once."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded stack")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--api-processes", type=int, default=1)
    parser.add_argument("--watch-stdin", action="store_true", help="stop when stdin closes")
    arguments = parser.parse_args()
    os.umask(0o077)  # what it keeps is its user's alone
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    if arguments.watch_stdin:

        def watch() -> None:
            sys.stdin.read()
            stopping.set()

        threading.Thread(target=watch, daemon=True).start()
    try:
        home = Path(os.path.realpath(arguments.home))
        serve(home, arguments.port, arguments.workers, arguments.api_processes, stopping)
    except Exception as error:
        kind = "" if isinstance(error, (StackError, OSError)) else f"{type(error).__name__}: "
        sys.exit(kind + " ".join(str(error).split()))


if __name__ == "__main__":
    main()
