"""Temporary folders that carry their owner in their name, so that what a killed process has left is known from what is in use.

    winnow.<host>.<pid>.<start>.<random>

`start` is in seconds since the host booted, which no change of its clock moves: with the process id it names one process.
"""

import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

_NAME = re.compile(r"winnow\.(?P<host>.+)\.(?P<pid>\d+)\.(?P<start>\d+)\.[0-9a-f]{16}")
_SAME_START_SECONDS = 2  # the seconds are rounded, those of the boot too
_FOREIGN_SECONDS = 86_400


def temporary_folder() -> Path:
    """Of this machine: where uploads are converted, and where the local copies of a remote store are."""
    return Path(tempfile.gettempdir())


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A fresh folder in `folder`, removed on leaving with all that is in it."""
    path = folder / f"winnow.{_host()}.{os.getpid()}.{_start(os.getpid())}.{secrets.token_hex(8)}"
    folder.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700)  # /tmp is everybody's
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def abandoned(folder: Path) -> list[Path]:
    """What processes of this host that are gone have left in `folder`, and what other hosts have not touched for a day."""
    found = []
    with suppress(FileNotFoundError, PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            name = _NAME.fullmatch(entry.name)
            if name and _is_abandoned(Path(entry.path), name["host"], int(name["pid"]), int(name["start"])):
                found.append(Path(entry.path))
    return found


def sweep(folder: Path) -> int:
    """Removes what is `abandoned` in `folder`. Returns how much of it; what may not be removed is left."""
    count = 0
    for path in abandoned(folder):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            log.info("removed %s, which a process that is gone had left", path)
            count += 1
    return count


def _is_abandoned(path: Path, host: str, pid: int, start: int) -> bool:
    if host != _host():
        return time.time() - _last_change(path) > _FOREIGN_SECONDS
    try:
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_ZOMBIE or abs(_start(pid) - start) > _SAME_START_SECONDS
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _start(pid: int) -> int:
    started: float = psutil.Process(pid).create_time() - psutil.boot_time()
    return round(started)


def _last_change(path: Path) -> float:
    """Of the folder or of a file in it: writing to a file does not change its folder."""
    times = [0.0]
    for each in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):
            times.append(each.lstat().st_mtime)
    return max(times)


def _host() -> str:
    """The host and its process ids' namespace: containers may share a host's name, and each counts its processes anew."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not on Linux
        namespace = 0
    return f"{socket.gethostname()}-{namespace}"
