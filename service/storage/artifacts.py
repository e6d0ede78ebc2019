"""The content-addressed store: immutable files named by what they depend on, in a folder or at any fsspec URL.

A file is written under a temporary name and renamed, so that a name that exists is whole, and has its checksums beside it:
whatever is read is checked. What is found damaged is set aside, so that nobody finds it again, and is there for an operator to
look at until retention removes it. The store is shared by the API (datasets) and the workers (tokens, embeddings, gradients),
and is the only thing both a compute child and the API see.
"""

import errno
import fcntl
import io
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from service.storage.checksums import SUFFIX, ArtifactDamaged, CheckedFile, Checksums
from service.storage.tempdirs import find_abandoned, remove_abandoned, temporary_directory

log = logging.getLogger(__name__)

KEY_PATTERN = "[a-z_]+/(?:[0-9a-f]{2}/[0-9a-f]{64}|job_[0-9a-f]{32})"
"""What the names of an artifact and of the files beside it (`.json`, ...) begin with."""

DAMAGED = "damaged"
"""The folder of what was set aside."""

_KEY = re.compile(rf"{KEY_PATTERN}[.a-z]*")
_MODIFIED = ("mtime", "LastModified", "last_modified")  # as file systems call it
_BUFFER_BYTES = 2**16
_MAX_REMEMBERED = 10_000
_LOCK_SECONDS = 1.0  # a lock is held for two renames, or for ever by a process that stands still: then the others go on


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of the store; `modified` is in seconds since 1970."""

    key: str
    size: int
    modified: float

    @property
    def is_set_aside(self) -> bool:
        """Whether it was found damaged."""
        return self.key.startswith(f"{DAMAGED}/")


def named_keys(value: Any) -> set[str]:
    """All artifacts that a JSON value names."""
    return set(_KEY.findall(json.dumps(value)))


class ArtifactStore:
    """Files by key under one root. Keys are made by the service, never by a user. `on_damage` gets the key and the reason of
    each artifact that is set aside."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.on_damage: Callable[[str, str], None] = lambda _key, _reason: None
        # Files that are read by their path, by (inode, size, time of change): those of one process do not change in between.
        self._checked: dict[Path, tuple[int, int, int]] = {}
        # Files that another process has removed must not be found in a cached list.
        fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self.fs = cast(fsspec.AbstractFileSystem, fs)
        self.is_local = isinstance(self.fs, LocalFileSystem)

    @property
    def temporary_folder(self) -> Path:
        """Where files are until they are whole: on the store's own file system if it has one, so that they can be renamed."""
        return Path(self.root, "tmp") if self.is_local else Path(tempfile.gettempdir())

    def count_abandoned(self) -> int:
        """How many temporary folders, of the store or of this machine, were left behind by processes that have ended."""
        return sum(1 for folder in self._temporary_folders() for _ in find_abandoned(folder))

    def remove_abandoned(self) -> int:
        """Removes those folders and returns their number."""
        return sum(remove_abandoned(folder) for folder in self._temporary_folders())

    def _temporary_folders(self) -> set[Path]:
        return {self.temporary_folder, Path(tempfile.gettempdir())}

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def exists(self, key: str) -> bool:
        """Whether it is there with its checksums; not whether it is whole."""
        return bool(self.fs.exists(self._path(key)) and self.fs.exists(self._path(key + SUFFIX)))

    def is_whole(self, key: str) -> bool:
        """Whether it is there and undamaged, for which it is read once. One that is damaged is set aside."""
        try:
            self._check(key)
        except (FileNotFoundError, ArtifactDamaged):
            return False
        return True

    def damage(self, key: str) -> str | None:
        """What is wrong with the file, if anything is; reads it wholly, and changes nothing."""
        try:
            with self._open(key, sets_aside=False) as file:
                file.check()
        except ArtifactDamaged as damaged:
            return damaged.reason
        except FileNotFoundError:
            return "it has no checksums" if self.fs.exists(self._path(key)) else None
        return None

    def describe(self, key: str) -> dict[str, Any]:
        """{key, size, xxh3}: what it consists of, for the record of the unit that made it. Reads the checksums only.

        Raises:
            FileNotFoundError: no artifact has this key.
            ArtifactDamaged: it has another size; it was set aside.
        """
        with self._open(key) as file:
            return {"key": key, "size": file.sums.size, "xxh3": file.sums.digest}

    def size(self, key: str) -> int:
        return int(self.fs.size(self._path(key)))

    def modified(self, key: str) -> float:
        """When it was written or, in a folder, last used: seconds since 1970.

        Raises:
            FileNotFoundError: no artifact has this key.
        """
        path = self._path(key)
        return self._modified(path, self.fs.info(path))

    def touch(self, key: str) -> None:
        """Records that the artifact is used now. An object store cannot: there the age counts from the writing."""
        if not self.is_local:
            return
        path = Path(self._path(key))
        # Gone: its reader will report that. Another user's: its age counts from the writing as well.
        with suppress(FileNotFoundError, PermissionError):
            is_known = self._checked.get(path) == _identity(path.stat())
            os.utime(path)
            if is_known:
                self._checked[path] = _identity(path.stat())

    def files(self, kind: str = "") -> Iterator[Stored]:
        """All files (of the kind) but those that are being written, listed a folder at a time. Checksums belong to their file;
        those that a crash has left without one are files of their own."""
        top = self._path(kind) if kind else self.root
        if not self.fs.exists(top):
            return
        for folder, folders, files in self.fs.walk(top, detail=True, on_error="raise"):
            if self.is_local and folder == self.root:
                folders.pop(self.temporary_folder.name, None)
            for name, info in files.items():
                if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in files:
                    continue
                path = info["name"]
                key = path.removeprefix(f"{self.root}/")
                yield Stored(key, int(info["size"]), self._modified(path, info))

    def _modified(self, path: str, info: Mapping[str, Any]) -> float:
        found = next((info[name] for name in _MODIFIED if name in info), None)
        if not isinstance(found, float | int | datetime):
            found = self.fs.modified(path)
        return found.timestamp() if isinstance(found, datetime) else float(found)

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """A local path to write to; on leaving without an error the file appears under `key`, else it is removed."""
        with temporary_directory(self.temporary_folder) as folder:
            path = folder / "content"
            yield path
            self._publish(path, key)

    def _publish(self, path: Path, key: str) -> None:
        with path.open("rb") as file:
            sums = path.with_name("sums")
            sums.write_bytes(Checksums.of(file).record())
        # The checksums come first: a name that exists has them.
        if not self.is_local:
            # An object store shows an object only once its upload is complete: the rename is the upload itself.
            self.fs.put_file(str(sums), self._path(key + SUFFIX))
            self.fs.put_file(str(path), self._path(key))
            return
        target = Path(self._path(key))
        _make_durable_folder(target.parent)
        for written in (sums, path):
            written.chmod(0o600)  # whatever the umask: it may hold what users sent
            _synchronise(written)
        with self._locked(target.parent, fcntl.LOCK_EX):
            sums.rename(self._path(key + SUFFIX))
            os.replace(path, target)
        # The name too: the database is about to record that the artifact exists, also after a loss of power.
        _synchronise(target.parent)

    @contextmanager
    def _locked(self, folder: Path, how: int) -> Iterator[None]:
        """A file and its checksums are replaced together, and opened together.

        Without the lock (an object store, some network file systems, a process that stands still while it holds it) two writers
        of one key at once, where a lease was lost, may leave the one's file with the other's checksums: the next reader finds it
        damaged, and it is made once more.
        """
        if not self.is_local:
            yield
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            give_up_at = time.monotonic() + _LOCK_SECONDS
            while not _has_locked(descriptor, how) and time.monotonic() < give_up_at:
                time.sleep(0.01)
            yield
        finally:
            os.close(descriptor)

    def open(self, key: str) -> IO[bytes]:
        """Opens for reading; each part is checked when it is read, and damage raises ArtifactDamaged then.

        Raises:
            FileNotFoundError: no artifact has this key, which is the error's `filename`.
            ArtifactDamaged: it has another size; it was set aside.
        """
        return io.BufferedReader(self._open(key), _BUFFER_BYTES)

    def _open(self, key: str, *, sets_aside: bool = True) -> CheckedFile:
        path = self._path(key)
        try:
            with self._locked(Path(path).parent, fcntl.LOCK_SH):
                record = self.fs.cat_file(path + SUFFIX)
                file = cast(IO[bytes], io.FileIO(path) if self.is_local else self.fs.open(path, "rb"))
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "not in the artifact store", key) from None
        inode = os.fstat(file.fileno()).st_ino if self.is_local else None
        refuse = partial(self._refuse, key, inode) if sets_aside else partial(_refused, key)
        try:
            return CheckedFile(file, Checksums.parse(record), refuse)
        except ValueError as error:
            file.close()
            refuse(str(error))
        except ArtifactDamaged:
            file.close()
            raise

    def _check(self, key: str) -> None:
        """Reads the whole file, unless this process has done so since it was last changed."""
        path = Path(self._path(key))
        with self._open(key) as file:
            known = _identity(os.fstat(file.fileno())) if self.is_local else None
            if known is None or self._checked.get(path) != known:
                file.check()
        if known is not None:
            if len(self._checked) >= _MAX_REMEMBERED:
                self._checked.clear()
            self._checked[path] = known

    def _refuse(self, key: str, inode: int | None, reason: str) -> NoReturn:
        """Sets the artifact aside, and reports it."""
        log.error("the artifact %s is damaged: %s", key, reason)
        try:
            self._set_aside(key, inode)
        except FileNotFoundError:
            pass  # another reader was first
        except OSError as error:
            log.warning("%s could not be set aside (%s)", key, error)
        self.on_damage(key, reason)
        raise ArtifactDamaged(key, reason)

    def _set_aside(self, key: str, inode: int | None) -> None:
        path, target = self._path(key), self._path(f"{DAMAGED}/{key.replace('/', '.')}.{uuid.uuid4().hex[:8]}")
        if self.is_local:
            _make_durable_folder(Path(target).parent)
        with self._locked(Path(path).parent, fcntl.LOCK_EX):
            if inode is not None and os.stat(path).st_ino != inode:
                return  # it has been made again meanwhile
            self.fs.mv(path, target)
            self.fs.rm_file(path + SUFFIX)
        if self.is_local:
            os.utime(target)  # its age counts from now

    def set_aside(self) -> list[Stored]:
        """What was found damaged and is still there."""
        return [file for file in self.files(DAMAGED) if file.is_set_aside]

    def read_json(self, key: str) -> Any:
        with self.open(key) as file:
            return json.load(file)

    def write_json(self, key: str, value: Any) -> None:
        with self.writing(key) as path:
            path.write_text(json.dumps(value))

    @contextmanager
    def local(self, key: str) -> Iterator[Path]:
        """A local path with the content, checked, for readers that map files into memory; a copy where the store is remote.

        Raises:
            FileNotFoundError: no artifact has this key, which is the error's `filename`.
            ArtifactDamaged: it was set aside.
        """
        if self.is_local:
            self._check(key)
            yield Path(self._path(key))
            return
        with temporary_directory(self.temporary_folder) as folder, self._open(key) as file:
            with (folder / "content").open("wb") as copy:
                shutil.copyfileobj(file, copy, 2**20)
            yield folder / "content"

    def delete(self, key: str) -> None:
        """Removes the artifact with its checksums; one that is gone already is no error."""
        for path in (self._path(key), self._path(key + SUFFIX)):
            if self.fs.exists(path):
                self.fs.rm_file(path)


def _refused(key: str, reason: str) -> NoReturn:
    raise ArtifactDamaged(key, reason)


def _has_locked(descriptor: int, how: int) -> bool:
    """False where another process holds it. A file system without locks counts as locked."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _make_durable_folder(folder: Path) -> None:
    """Makes the folder, and those above it, such that their names survive a loss of power."""
    if folder.is_dir():
        return
    _make_durable_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    _synchronise(folder.parent)


def _synchronise(path: Path) -> None:
    """Writes the file's content, or the folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
