"""The content-addressed store: immutable files named by what they depend on, in a folder or at any fsspec URL.

A file is written under a temporary name and renamed, so that a name that exists is whole. The store is shared by the API
(datasets) and the workers (tokens, embeddings, gradients), and is the only thing both a compute child and the API see.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem


def content_key(kind: str, depends_on: Mapping[str, Any], suffix: str) -> str:
    """The name of an artifact: `kind/ab/<sha256 of the canonical JSON of all it depends on><suffix>`."""
    canonical = json.dumps({"kind": kind, **depends_on}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return f"{kind}/{digest[:2]}/{digest}{suffix}"


class ArtifactStore:
    """Files by key under one root. Keys are made by us, never by a user."""

    def __init__(self, url: str) -> None:
        self.url = url
        fs, self.root = fsspec.core.url_to_fs(url)
        self.fs = cast(fsspec.AbstractFileSystem, fs)
        self._is_local = isinstance(self.fs, LocalFileSystem)

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def exists(self, key: str) -> bool:
        return bool(self.fs.exists(self._path(key)))

    def size(self, key: str) -> int:
        return int(self.fs.size(self._path(key)))

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """A local path to write to; on leaving without an error the file appears under `key`, else it is removed."""
        if self._is_local:
            folder = Path(self.root, "tmp")
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(mkdtemp(prefix="winnow-"))
        path = folder / uuid.uuid4().hex
        try:
            yield path
            self._publish(path, key)
        finally:
            path.unlink(missing_ok=True)
            if not self._is_local:
                shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, path: Path, key: str) -> None:
        if not self._is_local:
            # An object store shows an object only once its upload is complete: the rename is the upload itself.
            self.fs.put_file(str(path), self._path(key))
            return
        target = Path(self._path(key))
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(path, target)

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
        folder = Path(mkdtemp(prefix="winnow-"))
        try:
            self.fs.get_file(self._path(key), str(folder / "content"))
            yield folder / "content"
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def delete(self, key: str) -> None:
        """Removes the artifact; one that is gone already is no error."""
        path = self._path(key)
        if self.fs.exists(path):
            self.fs.rm_file(path)
