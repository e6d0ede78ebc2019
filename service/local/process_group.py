"""The processes of the embedded stack: each is started, kept running and stopped here, and none outlives this process."""

import ctypes
import json
import logging
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import redis

log = logging.getLogger("winnow.local")

START_SECONDS = 60.0
STOP_SECONDS = 30.0
LOG_BYTES = 16 * 2**20

_RESTART_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds; a process that ends once more ends the stack
_RAN_WELL_SECONDS = 60.0
_RECORD = "processes.json"


class StackError(Exception):
    """The stack cannot start or run; the message says why and where to look."""


class Stopped(Exception):
    """The stack is to stop while it starts."""


def free_port(port: int = 0) -> int:
    """The port, which nobody listens at; any such one for 0.

    Raises:
        StackError: it is taken, reserved, or no port.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = "is not a port (0 to 65535)" if isinstance(error, OverflowError) else f"{error.strerror}"
            raise StackError(f"port {port} cannot be used: {reason}; choose another with --port") from error
        return int(probe.getsockname()[1])


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usual_api_processes() -> int:
    """One for each core, as Python computes on one at a time; at most four, each of which takes memory and connections."""
    return min(cores(), 4)


def die_with_parent(death_signal: signal.Signals = signal.SIGKILL) -> None:
    """Run in a new process, on Linux: it gets the signal when the thread that started it ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, death_signal)  # PR_SET_PDEATHSIG


def only_as(user: str | None) -> dict[str, Any]:
    """Options of `subprocess`: with the user's rights and no others; as we are for None."""
    return {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def write_private(path: Path, content: str) -> None:
    """Writes a file that only its owner may read; it appears whole."""
    partial = path.with_suffix(".part")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
    partial.rename(path)


def parts(home: Path) -> dict[str, psutil.Process]:
    """The processes that the last stack of this folder has started and that still run, by name; "stack" is its own.

    A process that merely has the number of one that ended is not among them, nor are those of a folder that this is a copy of.
    """
    found = {}
    for name, identity in _record(home).get("processes", {}).items():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(identity[0])
            if _identity(process.pid) == tuple(identity) and _runs(process):
                found[name] = process
    return found


def _record(home: Path) -> dict[str, Any]:
    """What the last group of this folder has written; nothing where that was stopped, or the folder is a copy of its own."""
    try:
        record: dict[str, Any] = json.loads((home / _RECORD).read_bytes())
    except FileNotFoundError:
        return {}
    return record if record["home"] == str(home) else {}


def _runs(process: psutil.Process) -> bool:
    """A process that has ended may be there for ever, where nobody asks for its status, as in many a container."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _identity(pid: int) -> tuple[int, float]:
    """The process's number, and its start in seconds since that of the machine, whose clock may be set meanwhile."""
    return pid, round(psutil.Process(pid).create_time() - psutil.boot_time(), 2)


def wait_while(condition: Callable[[], bool], seconds: float) -> bool:
    """Waits as long as the condition holds, at most for so long; whether it still does."""
    deadline = time.monotonic() + seconds
    while still := condition():
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return still


def end_leftovers(home: Path) -> list[str]:
    """Ends what is left of a stack that was killed, and returns its names. Only for who holds the folder's lock."""
    left = parts(home)
    everything = [each for part in left.values() for each in (part, *part.children(recursive=True))]
    for part in left.values():
        with suppress(psutil.NoSuchProcess):
            part.send_signal(signal.SIGINT)  # to PostgreSQL a stop that does not wait for its clients
    wait_while(lambda: any(map(_runs, left.values())), STOP_SECONDS)
    for each in everything:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    wait_while(lambda: any(map(_runs, everything)), STOP_SECONDS)
    for folder in _record(home).get("folders", ()):
        shutil.rmtree(folder, ignore_errors=True)
    (home / _RECORD).unlink(missing_ok=True)
    return list(left)


@dataclass(slots=True)
class ManagedProcess:
    """A program that is started again when it ends. Its output is appended to `name`.log."""

    name: str
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGKILL
    popen: "subprocess.Popen[bytes]" = field(init=False)
    identity: tuple[int, float] = field(init=False)
    _log: Path = field(init=False)
    _log_start: int = 0
    _started_at: float = 0.0
    _restart_at: float | None = None
    _ends_in_a_row: int = 0

    def start(self, logs: Path) -> None:
        self._log = logs / f"{self.name}.log"
        with self._log.open("ab") as file:
            self._log_start = file.tell()
            self.popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,  # a Ctrl-C in the terminal is not for it
                preexec_fn=partial(die_with_parent, self.death_signal),
                **only_as(self.user),
            )
        self.identity = _identity(self.popen.pid)
        self._started_at, self._restart_at = time.monotonic(), None

    def is_due(self) -> bool:
        """Whether it has ended and is to be started again now: after a pause, which is longer each time in a row.

        Raises:
            StackError: it keeps ending.
        """
        if self.popen.poll() is None:
            return False
        now = time.monotonic()
        if self._restart_at is None:
            if now - self._started_at >= _RAN_WELL_SECONDS:
                self._ends_in_a_row = 0
            if self._ends_in_a_row == len(_RESTART_PAUSES):
                raise StackError(f"{self.name} keeps ending: it {self.last_words()}")
            pause = _RESTART_PAUSES[self._ends_in_a_row]
            self._ends_in_a_row += 1
            self._restart_at = now + pause
            log.warning("%s %s; restarting it in %.0f s", self.name, self.last_words(), pause)
        return now >= self._restart_at

    def last_words(self) -> str:
        """How it ended, and the end of its log since its start, from the last line on that tells of an error."""
        content = self._log.read_bytes()
        output = content[self._log_start :] if self._log_start <= len(content) else content
        lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
        errors = [i for i, line in enumerate(lines) if re.search(r"FATAL|PANIC|CRITICAL|ERROR|Error\b", line)]
        reason = " / ".join(lines[errors[-1] if errors else -1 :])[:400] or "it said nothing"
        return f"ended with status {self.popen.returncode}: {reason} (log: {self._log})"

    def stop(self) -> None:
        self.popen.send_signal(self.stop_signal)
        try:
            self.popen.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("%s did not stop within %.0f seconds; killing it", self.name, STOP_SECONDS)
            self.popen.kill()
            self.popen.wait()


class ProcessGroup:
    """Processes that are kept running, and stopped together in the reverse order of their start. Their logs are in `home`/logs.

    The group is recorded in the folder: if this process is killed, whatever is left is found there (`parts`).
    """

    def __init__(self, home: Path, stopping: threading.Event | None = None) -> None:
        self._home = home
        self._logs = home / "logs"
        self._stopping = stopping or threading.Event()
        self._processes: dict[str, ManagedProcess] = {}
        self._folders: list[str] = []
        self._at_end = ExitStack()
        self._write_record()

    def temporary_folder(self) -> Path:
        """A private folder with a short path, which is there until everything has stopped that is started from now on."""
        # A socket's path has room for 103 bytes on some systems, and 14 of them are the name of PostgreSQL's.
        short = tempfile.gettempdir() if len(os.fsencode(tempfile.gettempdir())) < 70 else "/tmp"
        self._folders.append(self._at_end.enter_context(tempfile.TemporaryDirectory(prefix="winnow-", dir=short)))
        self._write_record()
        return Path(self._folders[-1])

    def start(self, process: ManagedProcess) -> None:
        process.start(self._logs)
        self._at_end.callback(process.stop)
        self._processes[process.name] = process
        self._write_record()

    def _write_record(self) -> None:
        processes = {each.name: each.identity for each in self._processes.values()}
        processes["stack"] = _identity(os.getpid())
        record = {"home": str(self._home), "processes": processes, "folders": self._folders}
        write_private(self._home / _RECORD, json.dumps(record))

    def wait_until_answers(self, name: str, ask: Callable[[], object]) -> None:
        """Waits until `ask` raises no error of a client.

        Raises:
            StackError: the process ended, or did not answer in time.
            Stopped: the stack is to stop.
        """
        process, deadline = self._processes[name], time.monotonic() + START_SECONDS
        while True:
            try:
                ask()
                return
            except (psycopg.OperationalError, redis.RedisError, httpx.HTTPError) as error:
                answer = str(error).partition("\n")[0]
            if process.popen.poll() is not None:
                raise StackError(f"{name} {process.last_words()}")
            if time.monotonic() > deadline:
                raise StackError(
                    f"{name} did not answer within {START_SECONDS:.0f} seconds: {answer} (log: {self._logs})"
                )
            if self._stopping.wait(0.05):
                raise Stopped

    def tend(self) -> None:
        """Starts again what has ended, and bounds the logs; to be called every now and then.

        Raises:
            StackError: a process keeps ending.
        """
        for process in self._processes.values():
            if process.is_due():
                process.start(self._logs)
                self._write_record()
        for path in self._logs.glob("*.log"):
            if path.stat().st_size > LOG_BYTES:
                with suppress(OSError):  # on a full disk it does not grow either
                    shutil.copyfile(path, path.with_suffix(".log.1"))
                    os.truncate(path, 0)  # those who write to it append, and go on at the beginning

    def stop(self) -> None:
        self._at_end.close()
        (self._home / _RECORD).unlink(missing_ok=True)
