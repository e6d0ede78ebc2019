"""The content-addressed store: immutable files named by what they depend on, in a folder or at any fsspec URL.

A file is written under a temporary name and renamed, so that a name that exists is whole. The store is shared by the API
(datasets) and the workers (tokens, embeddings, gradients), and is the only thing both a compute child and the API see.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from service.scratch import scratch, sweep, temporary_folder

KEY_PATTERN = "[a-z_]+/(?:[0-9a-f]{2}/[0-9a-f]{64}|job_[0-9a-f]{32})"
"""What the names of an artifact and of the files beside it (`.json`, ...) begin with."""

_KEY = re.compile(rf"{KEY_PATTERN}[.a-z]*")
_MODIFIED = ("mtime", "LastModified", "last_modified")  # as file systems call it


@dataclass(frozen=True, slots=True)
class Stored:
    """A file of the store; `modified` is in seconds since 1970."""

    key: str
    size: int
    modified: float


def named_keys(value: Any) -> set[str]:
    """All artifacts that a JSON value names."""
    return set(_KEY.findall(json.dumps(value)))


def content_key(kind: str, depends_on: Mapping[str, Any], suffix: str) -> str:
    """The name of an artifact: `kind/ab/<sha256 of the canonical JSON of all it depends on><suffix>`."""
    canonical = json.dumps({"kind": kind, **depends_on}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return f"{kind}/{digest[:2]}/{digest}{suffix}"


class ArtifactStore:
    """Files by key under one root. Keys are made by us, never by a user."""

    def __init__(self, url: str) -> None:
        self.url = url
        # What another process has removed must not be found in a list of before.
        fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self.fs = cast(fsspec.AbstractFileSystem, fs)
        self._is_local = isinstance(self.fs, LocalFileSystem)

    @property
    def scratch_folder(self) -> Path:
        """Where files are before they are whole: on the store's own file system where it has one, so that they can be renamed."""
        return Path(self.root, "tmp") if self._is_local else temporary_folder()

    def sweep_scratch(self) -> int:
        """Removes what processes that are gone have left of their work, here and on this machine. Returns how much."""
        return sum(sweep(folder) for folder in {self.scratch_folder, temporary_folder()})

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def exists(self, key: str) -> bool:
        return bool(self.fs.exists(self._path(key)))

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
        """Says that the artifact is used now. An object store cannot be told: there the age counts from the writing."""
        if self._is_local:
            # Gone: whoever reads it will say so. Another user's: its age counts from the writing as well.
            with suppress(FileNotFoundError, PermissionError):
                os.utime(self._path(key))

    def files(self) -> Iterator[Stored]:
        """All files but those that are being written, listed a folder at a time."""
        if not self.fs.exists(self.root):
            return
        for folder, folders, files in self.fs.walk(self.root, detail=True, on_error="raise"):
            if self._is_local and folder == self.root:
                folders.pop(self.scratch_folder.name, None)
            for info in files.values():
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
        with scratch(self.scratch_folder) as folder:
            path = folder / "content"
            yield path
            self._publish(path, key)

    def _publish(self, path: Path, key: str) -> None:
        if not self._is_local:
            # An object store shows an object only once its upload is complete: the rename is the upload itself.
            self.fs.put_file(str(path), self._path(key))
            return
        target = Path(self._path(key))
        _make_durable_folder(target.parent)
        _synchronise(path)
        os.replace(path, target)
        # The name too: the database is about to say that the artifact is there, and a loss of power must not unsay it.
        _synchronise(target.parent)

    def open(self, key: str) -> IO[bytes]:
        """Opens for reading.

        Raises:
            FileNotFoundError: no artifact has this key.
        """
        return cast(IO[bytes], self.fs.open(self._path(key), "rb"))

    def read_json(self, key: str) -> Any:
        with self.open(key) as file:
            return json.load(file)

    def write_json(self, key: str, value: Any) -> None:
        with self.writing(key) as path:
            path.write_text(json.dumps(value))

    @contextmanager
    def local(self, key: str) -> Iterator[Path]:
        """A local path with the content, for readers that map files into memory; a copy where the store is remote."""
        if self._is_local:
            yield Path(self._path(key))
            return
        with scratch(self.scratch_folder) as folder:
            self.fs.get_file(self._path(key), str(folder / "content"))
            yield folder / "content"

    def delete(self, key: str) -> None:
        """Removes the artifact; one that is gone already is no error."""
        path = self._path(key)
        if self.fs.exists(path):
            self.fs.rm_file(path)


def _make_durable_folder(folder: Path) -> None:
    """Makes the folder, and those above it, such that their names survive a loss of power."""
    if folder.is_dir():
        return
    _make_durable_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _synchronise(folder.parent)


def _synchronise(path: Path) -> None:
    """Has the file's content, or the folder's names, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
