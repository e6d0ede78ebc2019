"""The embedded stack among faults: what is killed, what a killed one leaves, what is in its way, and whom it must not touch."""

import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import httpx
import psutil
import pytest
import redis
from support.processes import is_running, mentioning
from support.waiting import until

from service.local import doctor, process_group
from service.local.process_group import ManagedProcess, ProcessGroup, StackError, free_port, parts
from service.local.stack import StackProcess, stop_stack
from winnow.client import Winnow
from winnow.stack import Stack, is_in_use, running_stack

WINNOW = Path(sys.executable).with_name("winnow")


class Up:
    """`winnow up` with two workers, in a home that is a relative path through a link, and has any kind of character."""

    def __init__(self, folder: Path) -> None:
        real = folder / "a real, 'quoted' folder" / "größer % 数据"
        self.home = real / ("long " * 40).strip()
        real.mkdir(parents=True)
        (folder / "link").symlink_to(real)
        (self.home / "postgres.part").mkdir(parents=True)
        (self.home / "postgres.part" / "PG_VERSION").touch()  # left by a start that was killed
        self.metrics_port = free_port()
        environment = {**os.environ, "WINNOW_WORKER__METRICS_PORT": str(self.metrics_port)}
        self.process = subprocess.Popen(
            [WINNOW, "up", "--home", f"link/{self.home.name}", "--port", "0", "--workers", "2"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert any("The API is at" in line for line in self.process.stdout)  # and reads no further

    @property
    def stack(self) -> Stack:
        stack = running_stack(self.home)
        assert stack is not None
        return stack

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=120)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """All tests but the last leave it as it was."""
    started = Up(tmp_path_factory.mktemp("up"))
    yield started
    started.close()


def test_its_socket_has_a_short_path_that_only_its_user_may_take(up: Up) -> None:
    assert len(bytes(up.home)) > 200
    (folder,) = parse_qs(urlsplit(up.stack.database_url).query)["host"]
    assert len(folder) < 80
    assert os.stat(folder).st_mode & 0o777 == 0o700


def test_its_broker_has_a_password_that_nothing_shows(up: Up) -> None:
    url = urlsplit(up.stack.broker_url)
    assert url.password is not None
    assert len(url.password) >= 32
    with pytest.raises(redis.AuthenticationError), redis.Redis(port=url.port or 0) as stranger:
        stranger.ping()
    (settings,) = (path for path in (up.home / "valkey").iterdir() if url.password in path.read_text())
    assert settings.stat().st_mode & 0o077 == 0
    assert not any(url.password in word for part in parts(up.home).values() for word in part.cmdline())
    assert not any(url.password in log.read_text() for log in (up.home / "logs").iterdir())
    found = {result.name: result for result in doctor.examine(up.home)}
    assert found["broker"].level == "ok"
    assert url.password not in str(found)


def test_a_second_one_says_where_the_first_answers_and_touches_nothing(up: Up) -> None:
    def state() -> dict[str, bytes]:
        names = ("stack.json", "processes.json", "lock", "api_key", "valkey/valkey.conf", "logs/stack.log")
        return {name: (up.home / name).read_bytes() for name in names}

    before = state()
    second = subprocess.run([WINNOW, "up", "--home", up.home], capture_output=True, text=True, check=False)
    assert (second.returncode, second.stdout) == (1, "")
    assert f"in use by the stack at {up.stack.url}" in second.stderr.splitlines()[-1]
    assert state() == before
    assert is_in_use(up.home)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


def test_what_is_killed_is_started_again(up: Up) -> None:
    stack, before = up.stack, parts(up.home)
    for name in ("postgres", "valkey", "api", "worker1"):
        before[name].kill()

    def all_again() -> bool:
        now = parts(up.home)
        return now.keys() == before.keys() and all(now[name].pid != before[name].pid for name in again)

    again = ("postgres", "valkey", "api", "worker1")
    until("each runs again", all_again, 60)
    until("the service answers", lambda: answers(f"{stack.url}/readyz"), 60)
    for number in (0, 1):  # each worker at a port of its own
        until("Prometheus reads it", lambda n=number: answers(f"http://127.0.0.1:{up.metrics_port + n}/metrics"), 60)
    assert up.stack == stack
    assert parts(up.home)["worker2"] == before["worker2"]
    with Winnow(stack.url, stack.api_key) as client, redis.Redis.from_url(stack.broker_url) as broker:
        assert list(client.jobs()) == []
        assert broker.ping()


def test_when_it_is_killed_up_says_so_and_nothing_is_left(up: Up) -> None:
    """The last: the stack is gone afterwards."""
    running, stack = parts(up.home), up.stack
    running["stack"].kill()
    _, said = up.process.communicate(timeout=60)
    assert up.process.returncode == 1
    assert "status -9" in said.splitlines()[-1]
    ended = [subprocess.run([WINNOW, "down", "--home", up.home], check=False).returncode for _ in range(2)]
    assert ended[1] == 1  # nothing more to end
    assert not any(is_running(part.pid) for part in running.values())
    assert mentioning(str(up.home)) == []
    assert running_stack(up.home) is None
    assert not Path(*parse_qs(urlsplit(stack.database_url).query)["host"]).exists()


@pytest.fixture
def stranger() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def url_of_another() -> Iterator[str]:
    """Where something else answers by now."""

    class Well(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Well) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("is_locked", [False, True])
@pytest.mark.parametrize("of", ["an earlier process of that number", "another folder"])
def test_down_signals_no_stranger(
    tmp_path: Path, stranger: "subprocess.Popen[bytes]", url_of_another: str, of: str, is_locked: bool
) -> None:
    started = psutil.Process(stranger.pid).create_time() - psutil.boot_time()
    home, at = (tmp_path, started - 100) if "process" in of else (tmp_path / "original", started)
    names = ("stack", "postgres", "api")
    record = {"home": str(home), "processes": dict.fromkeys(names, (stranger.pid, round(at, 2)))}
    (tmp_path / "processes.json").write_text(json.dumps(record))
    stack = {"url": url_of_another, "api_key": "k", "database_url": "", "broker_url": "", "home": str(tmp_path)}
    (tmp_path / "stack.json").write_text(json.dumps({**stack, "pids": dict.fromkeys(names, stranger.pid)}))
    with (tmp_path / "lock").open("w") as lock:
        if is_locked:
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert (running_stack(tmp_path) is not None) == is_locked
        with pytest.raises(StackError):
            stop_stack(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        stranger.wait(0.2)


@pytest.mark.parametrize("ended_by", ["down", "up"])
def test_what_a_killed_stack_has_left_is_ended(tmp_path: Path, ended_by: str) -> None:
    """Where the kernel does not do it; a child of what is left, too, and though it does not heed the signal."""
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom service.local.process_group import ManagedProcess, ProcessGroup\n"
        "home = Path(sys.argv[1])\n(home / 'logs').mkdir()\n(home / 'lock').touch()\n"
        "command = ['sh', '-c', 'trap exit INT; sleep 601 & echo $!; wait']\n"
        "ProcessGroup(home).start(ManagedProcess('left', command, death_signal=0))\nos._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    left = parts(tmp_path)
    assert set(left) == {"left"}
    child = int(until("its child runs", (tmp_path / "logs" / "left.log").read_text))
    if ended_by == "down":
        stop_stack(tmp_path)
    else:
        with pytest.raises(StackError, match="99999"):
            start(tmp_path, 99999)
    assert not is_running(left["left"].pid)
    assert not is_running(child)


def start(home: Path, port: int = 0) -> None:
    process = StackProcess(home, port=port, workers=1)
    try:
        process.wait_ready()
    finally:
        process.stop()


def _fails(home: Path, *told: str, port: int = 0) -> None:
    """The start fails and says why, in one line; nothing of it runs on."""
    with pytest.raises(StackError) as failure:
        start(home, port)
    for word in told:
        assert word in str(failure.value)
    assert "\n" not in str(failure.value)
    assert mentioning(str(home)) == []


def test_a_start_that_fails_says_why_in_its_last_line(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _fails(home, f"port {port}", "in use", port=port)
    (tmp_path / "file").touch()
    _fails(tmp_path / "file", "file", "File exists")
    _fails(tmp_path / "file" / "home", "file", "Not a directory")
    _fails(Path("/proc/home"), "/proc/home")  # a file system that is read only, also to root
    (home / "lock").unlink()
    (home / "lock").mkdir()
    _fails(home, "lock", "Is a directory")
    (home / "lock").rmdir()
    (home / "postgres").mkdir(exist_ok=True)
    (home / "postgres" / "PG_VERSION").write_text("16\n")
    _fails(home, str(home / "postgres"), "PostgreSQL 16")
    up = subprocess.run([WINNOW, "up", "--home", home, "--port", "99999"], capture_output=True, text=True, check=False)
    assert up.returncode == 1
    assert "port 99999" in up.stderr.splitlines()[-1]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """No file can grow beyond a size that a new database needs."""
    home = tmp_path / "home"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        _fails(home, str(home / "postgres"), "could not")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (home / "postgres").exists()


def test_what_keeps_ending_ends_the_group_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_RESTART_PAUSES", (0.0, 0.1))
    said = "starting\n  ValueError: no space\n  on the device"
    (tmp_path / "logs").mkdir()
    group = ProcessGroup(tmp_path)
    group.start(ManagedProcess("steady", ["sleep", "600"]))
    group.start(ManagedProcess("ill", ["sh", "-c", f"echo '{said}'; exit 3"]))
    reason = r"ill .*status 3: ValueError: no space / on the device"
    with pytest.raises(StackError, match=reason):
        group.wait_until_answers("ill", lambda: httpx.get("http://127.0.0.1:1"))
    with pytest.raises(StackError, match=reason):
        until("it has given up", group.tend, 20)
    assert (tmp_path / "logs" / "ill.log").read_text() == 3 * f"{said}\n"
    (steady,) = parts(tmp_path).keys() - {"stack", "ill"}
    pid = parts(tmp_path)[steady].pid
    group.stop()
    assert not is_running(pid)


def test_logs_are_bounded_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "LOG_BYTES", 1000)
    (tmp_path / "logs").mkdir()
    log, go = tmp_path / "logs" / "wordy.log", tmp_path / "go"
    group = ProcessGroup(tmp_path)
    group.start(
        ManagedProcess("wordy", ["sh", "-c", f"seq 500; until test -e {go}; do sleep 0.1; done; echo more; sleep 9"])
    )
    try:
        until("it has written", lambda: log.read_text().endswith("500\n"), 20)
        group.tend()
        go.touch()
        until("it goes on", lambda: log.read_text() == "more\n", 20)
        assert log.with_suffix(".log.1").read_text().startswith("1\n2\n")
        group.tend()
        assert log.read_text() == "more\n"
    finally:
        group.stop()
