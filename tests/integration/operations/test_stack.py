"""The embedded stack as a process: it starts, it stops, and leaves nothing behind, however and whenever it is ended."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from support.processes import is_running, mentioning
from support.tiny import pool_rows, target_rows, write_jsonl
from support.waiting import until

from service.local.process_group import parts
from service.local.stack import login_address
from winnow.client import Winnow
from winnow.stack import Stack, running_stack

WINNOW = Path(sys.executable).with_name("winnow")


class Started:
    """`python -m service.local.stack`, and every process that belongs to its home or descends from it."""

    def __init__(self, home: Path, *arguments: str, port: int = 0, stdin: int = subprocess.DEVNULL) -> None:
        self.home = home
        self.log = home.with_suffix(".log")
        command = [sys.executable, "-m", "service.local.stack", "--home", str(home), "--port", str(port), *arguments]
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
        return mentioning(str(self.home))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder whose stack is gone afterwards, also where the test has failed."""
    path = tmp_path / "home"
    yield path
    if (stack := parts(path).get("stack")) is not None:
        stack.terminate()
        stack.wait(90)


@pytest.mark.slow
def test_it_starts_and_stops_whole(home: Path) -> None:
    started = Started(home)
    stack = started.ready()
    assert httpx.get(f"{stack.url}/readyz").is_success
    asked = parse_qs(urlsplit(login_address(stack, "/datasets")).query)
    logins = [httpx.post(f"{stack.url}/login", data=asked) for _ in range(2)]
    assert [answer.status_code for answer in logins] == [303, 401]
    assert logins[0].headers["location"] == "/datasets"
    running = parts(home)
    assert set(running) == {"stack", "postgres", "valkey", "api", "worker1"}
    everything = {p.pid for part in running.values() for p in [part, *part.children(True)]}
    for path in home.iterdir():  # PostgreSQL runs as another user where we are root
        assert path.stat().st_mode & 0o077 == 0, path

    port = int(stack.url.rpartition(":")[2])
    other = Started(home.with_name("other"), port=port)
    assert other.process.wait(timeout=120) == 1
    assert other.log.read_text().splitlines()[-1].startswith(f"port {port} cannot be used: ")
    assert other.left() == []

    ended = subprocess.run([WINNOW, "down", "--home", home], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert [pid for pid in everything if pid != started.process.pid and is_running(pid)] == []
    assert started.process.wait(timeout=30) == 0
    assert started.left() == []
    assert not (home / "stack.json").exists()
    for url in (stack.url, stack.broker_url):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(re.findall(r":(\d+)", url)[-1]))) != 0
    log = (home / "logs" / "api.log").read_bytes()

    again = Started(home)  # with the same data and key
    assert again.ready().api_key == stack.api_key
    assert (home / "logs" / "api.log").read_bytes().startswith(log)
    assert again.stop() == 0
    assert again.left() == []


@pytest.mark.parametrize("seconds", [0.3, 1.5, 3.0, 5.0])
def test_stopped_while_it_starts_it_leaves_nothing(home: Path, seconds: float) -> None:
    started = Started(home)
    time.sleep(seconds)
    assert started.stop() in (0, -signal.SIGTERM)  # the second: before it could listen
    assert started.left() == []
    assert not (home / "stack.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the processes of a parent that was killed")
@pytest.mark.slow
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_a_ctrl_c_or_a_kill_leaves_nothing(home: Path, tiny_llama: Path, ended_by: signal.Signals) -> None:
    """With a job under way, so that there is a compute process."""
    shutil.copytree(tiny_llama, home / "models" / "tiny")
    started = Started(home)
    stack = started.ready()
    with Winnow(stack.url, stack.api_key) as client:
        files = (
            write_jsonl(home / "pool.jsonl", pool_rows(40)),
            write_jsonl(home / "target.jsonl", target_rows(4, "python_function")),
        )
        pool, target = (client.upload_dataset(file)["id"] for file in files)
        settings = {"budget": 4, "landmarks": {"count": 12}, "max_length": 128}
        client.create_job(model="tiny", pool=pool, target=target, **settings)
    running = parts(home)
    worker = running["worker1"]
    compute = until("there is a compute process", lambda: worker.children(recursive=True))[0]
    rest = [p.pid for p in running["stack"].children(recursive=True) if p.pid != compute.pid]
    os.killpg(started.process.pid, ended_by)
    started.process.wait(timeout=60)
    until("all others are gone", lambda: not any(is_running(pid) for pid in rest), 10)
    # It may still be importing its libraries: it sees that its supervisor is gone as soon as it has.
    until("the compute process is gone", lambda: not is_running(compute.pid))
    assert started.left() == []
    if ended_by == signal.SIGKILL:  # its data is whole, and its port and its lock are free
        port = int(stack.url.rpartition(":")[2])
        restarted = Started(home, port=port)
        assert restarted.ready().api_key == stack.api_key
        assert restarted.stop() == 0


def test_it_ends_with_the_process_that_started_it(home: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom service.local.stack import StackProcess\n"
        "StackProcess(Path(sys.argv[1]), port=0, workers=1).wait_ready()\nprint('up', flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(home)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        pids = [part.pid for part in parts(home).values()]
        parent.kill()
    until("every part is gone", lambda: not any(is_running(pid) for pid in pids), 60)
    assert len(pids) == 5
    assert not (home / "stack.json").exists()
