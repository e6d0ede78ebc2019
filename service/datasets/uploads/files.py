"""The parts of an upload in the artifact store, and the file that they make together.

uploads/<id>.<number>    a part; numbers have five digits, from 00000
"""

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from typing import IO, Self

from sqlalchemy.exc import DBAPIError

from service.datasets.tables import Upload
from service.datasets.uploads import repository, service
from service.db.engine import Sessions
from service.http.errors import Unprocessable
from service.storage.artifacts import ArtifactStore
from service.storage.checksums import SUFFIX, ArtifactDamaged

_KEY = re.compile(rf"uploads/(?P<upload>up_[0-9a-f]{{32}})\.[0-9]{{5}}(?:{re.escape(SUFFIX)})?")
_COPY_BYTES = 2**20
_NOTE_SECONDS = 1.0


def part_key(upload_id: str, number: int) -> str:
    return f"uploads/{upload_id}.{number:05}"


def upload_of(key: str) -> str | None:
    """The id of the upload that a file of the store is a part of; None if it is none."""
    found = _KEY.fullmatch(key)
    return None if found is None else found["upload"]


def keep(store: ArtifactStore, key: str, content: IO[bytes]) -> None:
    """Stores a part, in place of what may be there: a part that was not counted, or the same once more."""
    content.seek(0)
    with store.writing(key) as path, path.open("wb") as file:
        shutil.copyfileobj(content, file, _COPY_BYTES)


def remove(store: ArtifactStore, upload: Upload) -> None:
    """Removes all parts, and one that came and was not counted."""
    for number in range(upload.received + 1):
        store.delete(part_key(upload.id, number))


@contextmanager
def assembled(
    sessions: Sessions, store: ArtifactStore, upload: Upload, note: Callable[[int], None]
) -> Iterator[IO[bytes]]:
    """The whole file. One that is not what was announced, or has lost parts, is removed: there is no other way on.

    Raises:
        NotFound: the upload was removed meanwhile.
        Unprocessable: its content is not what was announced.
    """
    digest = hashlib.sha256()
    with TemporaryFile(prefix="winnow-") as file:
        try:
            for number in range(upload.received):
                note(0)
                with store.open(part_key(upload.id, number)) as part:
                    while piece := part.read(_COPY_BYTES):
                        digest.update(piece)
                        file.write(piece)
        except (FileNotFoundError, ArtifactDamaged):
            digest = hashlib.sha256()
        if digest.hexdigest() != upload.sha256:
            with sessions.begin() as session:
                service.remove(session, upload)
            remove(store, upload)
            raise Unprocessable(
                "upload: what came is not the file that was announced: its sha256 is another, or parts were lost. It was deleted;"
                " begin the upload again.",
                param="upload",
                code="upload_damaged",
            )
        file.flush()
        yield file


class Reading:
    """A dataset is made of an upload by one request at a time, which notes now and then how far it is."""

    def __init__(self, sessions: Sessions, upload: Upload) -> None:
        self._sessions, self._upload_id = sessions, upload.id
        self._next = time.monotonic() + _NOTE_SECONDS

    def __enter__(self) -> Self:
        """
        Raises:
            Conflict: another request has begun.
        """
        with self._sessions.begin() as session:
            if not repository.begin_reading(session, self._upload_id):
                raise service.in_use()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(DBAPIError), self._sessions.begin() as session:
            repository.end_reading(session, self._upload_id)

    def note(self, rows: int) -> None:
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + _NOTE_SECONDS
        # It only informs: nothing fails for it.
        with suppress(DBAPIError), self._sessions.begin() as session:
            repository.note_reading(session, self._upload_id, rows)
