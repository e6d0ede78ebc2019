"""The embedded stack as a process: it starts, it stops, and nothing of it stays, at whatever moment it is told to."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from worker_world import is_running, until

from service.local import Stack, running_stack


class Started:
    """`python -m service.local`, and every process that belongs to its home or descends from it."""

    def __init__(self, home: Path, *arguments: str, port: int = 0, stdin: int = subprocess.DEVNULL) -> None:
        self.home = home
        self.log = home.with_suffix(".log")
        command = [sys.executable, "-m", "service.local", "--home", str(home), "--port", str(port), *arguments]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, stdin=stdin, stdout=file, stderr=file, start_new_session=True)

    def ready(self) -> Stack:
        def stack() -> Stack | None:
            assert self.process.poll() is None, self.log.read_text()
            return running_stack(self.home)

        return until("the stack answers", stack, 120)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=90)

    def left(self) -> list[str]:
        """The processes that name this home on their command line, or hold it in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                words = " ".join([*process.cmdline(), *process.environ().values()])
                if process.pid != os.getpid() and str(self.home) in words and is_running(process.pid):
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
            except psutil.Error:
                continue
        return found


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder whose stack is gone afterwards, also where the test has failed."""
    path = tmp_path / "home"
    yield path
    with_stack = running_stack(path)
    if with_stack is not None:
        os.kill(with_stack.pids["stack"], signal.SIGTERM)
        until("the stack is gone", lambda: not is_running(with_stack.pids["stack"]), 60)


def test_it_starts_refuses_a_second_one_and_stops_whole(home: Path) -> None:
    started = Started(home)
    stack = started.ready()
    assert httpx.get(f"{stack.url}/readyz").is_success
    assert (home / "stack.json").stat().st_mode & 0o077 == 0
    assert (home / "secret_key").stat().st_mode & 0o077 == 0
    assert set(stack.pids) == {"stack", "postgres", "valkey", "api", "worker1"}
    everything = {
        p.pid for pid in stack.pids.values() for p in [psutil.Process(pid), *psutil.Process(pid).children(True)]
    }

    second = Started(home)
    assert second.process.wait(timeout=60) == 1
    assert re.search(r"a stack already runs from .*home; stop it, or choose another folder", second.log.read_text())
    assert running_stack(home) == stack

    port = int(stack.url.rpartition(":")[2])
    other = Started(home.with_name("other"), port=port)
    assert other.process.wait(timeout=120) == 1
    assert f"port {port} is in use; choose another with --port" in other.log.read_text()
    assert other.left() == []

    assert started.stop() == 0
    until("every process is gone", lambda: not any(is_running(pid) for pid in everything), 10)
    assert started.left() == []
    assert not (home / "stack.json").exists()
    for url in (stack.url, stack.broker_url):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(re.findall(r":(\d+)", url)[-1]))) != 0

    again = Started(home)  # with the same data and key
    assert again.ready().api_key == stack.api_key
    assert again.stop() == 0
    assert again.left() == []


@pytest.mark.parametrize("seconds", [0.3, 1.5, 3.0, 5.0])
def test_told_to_stop_while_it_starts_it_leaves_nothing(home: Path, seconds: float) -> None:
    started = Started(home)
    time.sleep(seconds)
    assert started.stop() in (0, -signal.SIGTERM)  # the second: before it could listen
    assert started.left() == []
    assert not (home / "stack.json").exists()


def test_it_ends_with_the_process_that_started_it(home: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom service.local import StackProcess\n"
        "StackProcess(Path(sys.argv[1]), port=0, workers=1).wait_ready()\nprint('up', flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(home)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        pids = json.loads((home / "stack.json").read_text())["pids"]
        parent.kill()
    until("every part is gone", lambda: not any(is_running(pid) for pid in pids.values()), 60)
    assert not (home / "stack.json").exists()
