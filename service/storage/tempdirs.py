"""Temporary folders that are locked while in use, so that those of killed processes can be recognised and removed.

    winnow.<host>.<random>

The owner holds a lock (flock) on the folder, which the kernel releases when the process ends, however it ends. Locks do not
reach other hosts on every file system: another host's folder counts as abandoned once it has not changed for a day.
"""

import fcntl
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

_NAME = re.compile(r"winnow\.(?P<host>.+)\.[a-z0-9_]{8}")
_OTHER_HOST_SECONDS = 86_400


def make_private_folder(folder: Path) -> None:
    """Makes the folder, and those above it, for this user alone; those that exist stay as they are."""
    if not folder.is_dir():
        make_private_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


@contextmanager
def temporary_directory(parent: Path | None = None) -> Iterator[Path]:
    """A new private folder in `parent` (default: this machine's temporary folder), removed with its content on leaving."""
    if parent is not None:
        make_private_folder(parent)
    path, lock = _create_locked(parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _create_locked(parent: Path | None) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"winnow.{socket.gethostname()}.", dir=parent))
        # A sweep that comes between the two removes the folder, and we start over.
        with suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if path.exists():
                return path, lock
            os.close(lock)


def find_abandoned(parent: Path) -> Iterator[Path]:
    """The folders in `parent` that nobody uses any more; each one stays locked until the next is requested."""
    try:
        paths = [(path, name["host"]) for path in parent.iterdir() if (name := _NAME.fullmatch(path.name))]
    except (FileNotFoundError, PermissionError):
        return
    for path, host in paths:
        if host != socket.gethostname():
            if time.time() - _last_change(path) > _OTHER_HOST_SECONDS:
                yield path
            continue
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # removed meanwhile, another user's, or not a folder
            continue
        try:
            with suppress(OSError):  # locked: in use; or a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield path
        finally:
            os.close(lock)


def remove_abandoned(parent: Path) -> int:
    """Removes the abandoned folders in `parent` and returns their number; those that we may not remove stay."""
    count = 0
    for path in find_abandoned(parent):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            log.info("removed %s, left behind by a process that has ended", path)
            count += 1
    return count


def _last_change(path: Path) -> float:
    """Of the folder or any file in it (writing to a file does not change its folder): seconds since 1970."""
    times = [0.0]
    for each in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):
            times.append(each.lstat().st_mtime)
    return max(times)
