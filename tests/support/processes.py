"""The API and workers as processes of their own, which a test kills, freezes and starts again."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import psutil

from service.local.process_group import die_with_parent
from service.settings import ApiSettings

ROOT = Path(__file__).parents[2]


class Process:
    """A `python -m` that can be started again under the same command and environment."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._command = [sys.executable, "-m", *arguments]
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @classmethod
    def api(cls, settings: ApiSettings, port: int, log: Path, *options: str, **environment: str) -> Self:
        """`options` are uvicorn's."""
        secret = {"WINNOW_SECRET_KEY": settings.secret_key.get_secret_value()}
        command = [
            "uvicorn",
            "service.app:create_app",
            "--factory",
            "--http",
            "service.http.protocol:TimedHeads",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            *options,
        ]
        return cls(command, {**environment_of(settings), **secret, **environment}, log)

    @classmethod
    def apis(cls, settings: ApiSettings, port: int, log: Path, count: int, **environment: str) -> Self:
        """Several that share the port, as the image starts them."""
        secret = {"WINNOW_SECRET_KEY": settings.secret_key.get_secret_value()}
        command = ["service.serve", "--port", str(port), "--processes", str(count)]
        return cls(command, {**environment_of(settings), **secret, **environment}, log)

    @classmethod
    def worker(cls, settings: ApiSettings, log: Path, **environment: str) -> Self:
        """As the embedded stack starts it, without the secret of the API."""
        command = ["celery", "-A", "worker.celery_app", "worker", "-P", "threads", "-c", "1", "--without-gossip"]
        command += ["--without-mingle", "--loglevel", "INFO", "-n", f"{log.stem}@winnow"]
        return cls(command, {**environment_of(settings), **environment}, log)

    def start(self) -> None:
        with self.log.open("ab") as file:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self._environment},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def children(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.pid).children(recursive=True)] if self.is_alive else []

    def compute_process(self) -> int | None:
        """The process id of a worker's compute process."""
        children = psutil.Process(self.pid).children()
        return next((c.pid for c in children if "worker.process.main" in " ".join(c.cmdline())), None)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, as the kernel's out-of-memory killer sends it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def wait(self, seconds: float = 60) -> int:
        """The exit status, once it has ended by itself."""
        assert self._process is not None
        return self._process.wait(seconds)

    def stop(self) -> int:
        """SIGTERM, as an operator's supervisor sends it: the exit status."""
        assert self._process is not None
        if self.is_alive:
            self._process.terminate()
        try:
            return self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


@contextmanager
def running(process: Process) -> Iterator[Process]:
    """It is gone afterwards."""
    try:
        yield process
    finally:
        process.stop()


def environment_of(settings: ApiSettings) -> dict[str, str]:
    """What a process needs to have the same settings, but for the secret, which is the API's alone."""
    groups = settings.model_dump(mode="json", exclude_unset=True, exclude={"secret_key"})
    return {
        f"WINNOW_{group}__{name}".upper(): value if isinstance(value, str) else json.dumps(value)
        for group, values in groups.items()
        for name, value in values.items()
    }


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def having(name: str, value: str) -> list[int]:
    """The processes with the variable in their environment; those that have ended and were not waited for do not count."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def mentioning(text: str) -> list[str]:
    """The other running processes with the text on their command line or in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join([*process.cmdline(), *process.environ().values()])
            if process.pid != os.getpid() and text in words and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
        except psutil.Error:
            continue
    return found
