"""Temporary folders are locked by their owner: what a killed process left is removed, what a live one uses is not."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.ids import new_id
from service.storage.artifacts import ArtifactStore
from service.storage.tempdirs import remove_abandoned, temporary_directory

KEY = f"embeddings/ab/ab{'0' * 62}.safetensors"
DAY = 86_400

WRITER = """
import sys
from service.storage.artifacts import ArtifactStore

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
    return [name for name in os.listdir(store.temporary_folder) if name.startswith("winnow.")]


def test_what_a_killed_writer_leaves_is_removed_and_only_then(store: ArtifactStore, tmp_path: Path) -> None:
    with writer(store.url, tmp_path) as process:
        assert store.remove_abandoned() == 0
        assert len(left(store)) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert store.remove_abandoned() == 1
    assert left(store) == []
    assert not store.exists(KEY)


def test_a_living_writer_is_not_disturbed_by_a_sweep(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    with writer(store.url, tmp_path) as process:
        assert store.remove_abandoned() == 0
        process.communicate()
        assert process.returncode == 0
    assert store.size(KEY) == len(b"half")
    assert left(store) == []


def test_a_killed_process_that_nobody_has_waited_for_has_ended(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    with writer(store.url, tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie from now on
        assert remove_abandoned(store.temporary_folder) == 1


def test_it_is_there_for_the_context_alone(tmp_path: Path) -> None:
    with temporary_directory(tmp_path / "deep" / "tmp") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_bytes(b"content")
        assert folder.stat().st_mode & 0o077 == 0
        assert remove_abandoned(tmp_path / "deep" / "tmp") == 0
        assert (folder / "part" / "file").exists()
    assert list((tmp_path / "deep" / "tmp").iterdir()) == []


def test_it_is_removed_when_its_use_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with temporary_directory(tmp_path) as folder:
            (folder / "file").write_bytes(b"half")
            raise RuntimeError("mid-way")

    with pytest.raises(RuntimeError, match="mid-way"):
        fail()
    assert list(tmp_path.iterdir()) == []


def make_folder(parent: Path, name: str, *, age_seconds: float = 0) -> Path:
    path = parent / name
    path.mkdir()
    (path / "content").write_bytes(b"half")
    for each in (path / "content", path):
        age(each, age_seconds)
    return path


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_another_hosts_is_left_for_a_day_after_its_last_change(tmp_path: Path) -> None:
    fresh, still_written, old = (
        make_folder(tmp_path, f"winnow.elsewhere.example.{name}", age_seconds=seconds)
        for name, seconds in (("abcdefg1", DAY / 2), ("abcdefg2", 2 * DAY), ("abcdefg3", 2 * DAY))
    )
    age(still_written / "content", 0)
    age(still_written, 2 * DAY)
    assert remove_abandoned(tmp_path) == 1
    assert set(tmp_path.iterdir()) == {fresh, still_written}
    assert not old.exists()


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    names = {"winnow-x", "winnow.host.0123456789abcdef", "systemd-private", "winnow.abcdefgh"}
    for name in names:
        make_folder(tmp_path, name, age_seconds=30 * DAY)
    (tmp_path / f"winnow.{socket.gethostname()}.abcdefgh").symlink_to(tmp_path / "winnow-x")
    (tmp_path / f"winnow.{socket.gethostname()}.abcdefg1").write_text("a file")
    assert remove_abandoned(tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == len(names) + 2
    assert remove_abandoned(tmp_path / "none") == 0


def test_a_sweep_between_the_making_of_a_folder_and_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The removed folder is created once more, so that the caller has one."""
    swept = []
    flock = fcntl.flock

    def sweep_first(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH and not swept:
            swept.append(remove_abandoned(tmp_path))
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", sweep_first)
    with temporary_directory(tmp_path) as folder:
        assert folder.is_dir()
        assert remove_abandoned(tmp_path) == 0
    assert swept == [1]
