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
import psycopg
import pytest
from worker_world import is_running, until

from service.local import Stack, running_stack
from service.processes import Restarts


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


def tells_of_itself(stack: Stack, pid: int) -> bool:
    """Whether the worker of this process has said in the database that it runs."""
    with psycopg.connect(stack.database_url.replace("postgresql+psycopg", "postgresql")) as connection:
        rows = connection.execute("SELECT 1 FROM worker_processes WHERE worker_id LIKE %s", [f"%:{pid}"])
        return rows.fetchone() is not None


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


def test_a_worker_that_is_killed_is_started_again_and_down_waits_until_all_has_ended(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("WINNOW_WORKER__METRICS_PORT", str(port))
    started = Started(home, "--workers", "2")
    first = started.ready()
    pids = [first.pids["worker1"]]
    for pause in (1, 2):
        until("the worker runs", lambda: tells_of_itself(first, pids[-1]))
        os.kill(pids[-1], signal.SIGKILL)

        def another() -> int | None:
            stack = running_stack(home)
            return stack.pids["worker1"] if stack is not None and stack.pids["worker1"] != pids[-1] else None

        pids.append(until("another worker is there", another))
        assert f"worker1 ended with status -9; starting it again in {pause} s" in started.log.read_text()
    until("the last worker runs", lambda: tells_of_itself(first, pids[-1]))
    for number in (0, 1):  # each worker at a port of its own
        until("Prometheus could read it", lambda n=number: answers(f"http://127.0.0.1:{port + n}/metrics"))
    assert httpx.get(f"{first.url}/readyz").is_success

    ended = subprocess.run(
        [Path(sys.executable).parent / "winnow", "down", "--home", home], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert not (home / "stack.json").exists()
    parts = {**first.pids, "worker1": pids[-1]}
    assert [name for name, pid in parts.items() if name != "stack" and is_running(pid)] == []
    assert started.process.wait(timeout=30) == 0
    assert started.left() == []


def test_pauses_between_starts_grow_and_begin_anew_once_it_ran_well() -> None:
    restarts = Restarts(now=0.0)
    now, pauses = 0.0, []
    for ran in (5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 100.0, 1.0):
        now += ran
        pause = restarts.ended(now)
        assert pause is not None
        assert restarts.ended(now) is None  # it is told once
        assert not restarts.is_due(now + pause - 0.1)
        now += pause
        assert restarts.is_due(now)
        assert not restarts.is_due(now + 100)  # it runs
        pauses.append(pause)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 1, 2]
