"""Temporary folders name their owner: what a killed process has left is removed, what a living one holds is not."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from service import scratch as module
from service.artifacts import ArtifactStore
from service.ids import new_id
from service.scratch import scratch, sweep

KEY = f"embeddings/ab/ab{'0' * 62}.safetensors"
DAY = 86_400

WRITER = """
import sys
from service.artifacts import ArtifactStore

with ArtifactStore(sys.argv[1]).writing(sys.argv[2]) as path:
    path.write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@contextmanager
def writer(store: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the midst of writing an artifact; when its stdin closes, it goes on and publishes it."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, store, KEY],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "writing\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(params=["folder", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """The temporary folder of the machine, where a remote store's copies are, is the test's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return ArtifactStore(str(tmp_path / "store") if request.param == "folder" else f"memory://{new_id('store')}")


def left(store: ArtifactStore) -> list[str]:
    return [name for name in os.listdir(store.scratch_folder) if name.startswith("winnow.")]


def test_what_a_killed_writer_leaves_is_removed_and_only_then(store: ArtifactStore, tmp_path: Path) -> None:
    with writer(store.url, tmp_path) as process:
        assert store.sweep_scratch() == 0
        assert len(left(store)) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert store.sweep_scratch() == 1
    assert left(store) == []
    assert not store.exists(KEY)


def test_a_living_writer_is_not_disturbed_by_a_sweep(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    with writer(store.url, tmp_path) as process:
        assert store.sweep_scratch() == 0
        process.communicate()
        assert process.returncode == 0
    assert store.size(KEY) == len(b"half")
    assert left(store) == []


def test_a_killed_process_that_nobody_has_waited_for_is_gone_too(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    with writer(store.url, tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 60
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert sweep(store.scratch_folder) == 1


def test_it_is_there_for_the_context_alone(tmp_path: Path) -> None:
    with scratch(tmp_path / "deep" / "tmp") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_bytes(b"content")
        assert folder.stat().st_mode & 0o077 == 0
        assert sweep(tmp_path / "deep" / "tmp") == 0
        assert (folder / "part" / "file").exists()
    assert list((tmp_path / "deep" / "tmp").iterdir()) == []


def test_it_is_removed_when_its_use_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with scratch(tmp_path) as folder:
            (folder / "file").write_bytes(b"half")
            raise RuntimeError("mid-way")

    with pytest.raises(RuntimeError, match="mid-way"):
        fail()
    assert list(tmp_path.iterdir()) == []


def renamed(folder: Path, tmp_path: Path, **changes: str) -> Path:
    """A copy of a folder of ours, of another owner."""
    parts = dict(
        zip(("host", "pid", "start", "random"), folder.name.removeprefix("winnow.").rsplit(".", 3), strict=True)
    )
    path = tmp_path / ".".join(("winnow", *{**parts, **changes}.values()))
    path.mkdir()
    (path / "content").write_bytes(b"half")
    return path


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_process_that_has_the_number_of_an_earlier_one_is_not_its_owner(tmp_path: Path) -> None:
    with scratch(tmp_path) as folder:
        start = int(folder.name.split(".")[-2])
        earlier = renamed(folder, tmp_path, start=str(max(0, start - 3600)), random="0" * 16)
        assert sweep(tmp_path) == 1
        assert not earlier.exists()
        assert folder.exists()


def test_another_hosts_is_left_for_a_day_after_its_last_change(tmp_path: Path) -> None:
    with scratch(tmp_path) as folder:
        fresh = renamed(folder, tmp_path, host="elsewhere.example-1", pid="1", random="0" * 16)
        still_written = renamed(folder, tmp_path, host="elsewhere.example-1", pid="2", random="0" * 16)
        old = renamed(folder, tmp_path, host="elsewhere.example-1", pid="3", random="0" * 16)
        for path in (still_written, old, old / "content"):
            age(path, 2 * DAY)
        age(fresh, DAY / 2)
        assert sweep(tmp_path) == 1
        assert not old.exists()
        assert fresh.exists()
        assert still_written.exists()


def test_what_is_not_of_this_kind_is_left_alone(tmp_path: Path) -> None:
    for name in ("winnow-x", "winnow.host.1.x.0123456789abcdef", "systemd-private", f"winnow.h.999999999.1.{'g' * 16}"):
        (tmp_path / name).mkdir()
        age(tmp_path / name, 30 * DAY)
    assert sweep(tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert sweep(tmp_path / "none") == 0


def test_containers_of_one_name_are_hosts_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the host's name, and one's process ids say nothing of the other's."""
    here = module._host()
    namespace = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0
    assert here.endswith(f"-{namespace}")
    with scratch(tmp_path) as folder:
        other = renamed(folder, tmp_path, host=f"{here}1", pid="999999999", random="0" * 16)
        assert sweep(tmp_path) == 0
        assert other.exists()
