"""How a file is sent: in one request or, where it is large, in parts, of which a connection that breaks costs one.

The service knows a file that is sent in parts by its size and sha256: whoever sends the same file again, after whatever ended the
first attempt, goes on where that stopped. Nothing is kept on this side.
"""

import hashlib
import io
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import httpx

from winnow.answers import Dataset, Upload
from winnow.errors import Unreachable, WinnowError
from winnow.transport import Connection

PARTS_FROM = 64 * 2**20
"""Files of so many bytes are sent in parts."""

_HASHED_BYTES = 2**22
_PIECE_BYTES = 2**16
_LOOK_SECONDS = 1.0
_IN_USE_SECONDS = 2.0

Source = str | os.PathLike[str] | bytes


@dataclass(frozen=True, slots=True)
class UploadProgress:
    """How far an upload is.

    Attributes:
        step: `checksum`: a large file is read once before it is sent; `send`; `read`: the service reads the rows.
        done: bytes; in `read`, rows so far, which only large files tell.
        total: bytes of the file; None in `read`.
    """

    step: Literal["checksum", "send", "read"]
    done: int
    total: int | None


OnProgress = Callable[[UploadProgress], object]


class Uploading(Connection):
    async def _upload(self, source: Source, params: dict[str, str], on_progress: OnProgress | None) -> Dataset:
        """The dataset that the service makes of the file."""
        report = on_progress or _ignore
        with _opened(source) as file:
            size = file.seek(0, os.SEEK_END)
            if size >= PARTS_FROM:
                upload = await self._send_parts(file, size, report)
                return await self._finish(upload.id, params, on_progress)
            headers = {"Idempotency-Key": str(uuid.uuid4()), "Content-Length": str(size)}

            async def attempt() -> httpx.Response:
                pieces = _pieces(file, 0, size, lambda done: report(UploadProgress("send", done, size)))
                content = self._content(pieces)
                return await self._post(params, headers, content=content)

            return self._read(Dataset, (await self._send("POST", attempt)).content)

    async def _send_parts(self, file: IO[bytes], size: int, report: OnProgress) -> Upload:
        digest = hashlib.sha256()
        pieces = _pieces(file, 0, size, lambda done: report(UploadProgress("checksum", done, size)), _HASHED_BYTES)

        def read() -> None:
            for piece in pieces:
                digest.update(piece)

        await self._off_loop(read)
        body = {"bytes": size, "sha256": digest.hexdigest()}
        upload = await self._one(Upload, "POST", "/uploads", json=body)
        while upload.received < upload.parts:
            upload = await self._send_part(file, upload, report)
        return upload

    async def _send_part(self, file: IO[bytes], upload: Upload, report: OnProgress) -> Upload:
        """Sends the next part, with twice the retries of other requests; the upload as it is then."""
        number, total = upload.received, upload.bytes
        start = number * upload.part_bytes
        size = min(upload.part_bytes, total - start)
        path = f"/uploads/{upload.id}"
        headers = {"Content-Length": str(size)}

        async def attempt() -> httpx.Response:
            pieces = _pieces(file, start, size, lambda done: report(UploadProgress("send", start + done, total)))
            content = self._content(pieces)
            request = self._http.build_request("PUT", f"{path}/parts/{number}", content=content, headers=headers)
            return await self._send_once(request)

        try:
            response = await self._send("PUT", attempt, retries=2 * self._retries)
            return self._read(Upload, response.content)
        except Unreachable as error:
            advice = f"{start:,} of {total:,} bytes have arrived; upload the same file again to go on from there."
            raise Unreachable(error.error, advice) from error
        except WinnowError as error:
            if error.code != "part_not_next":
                raise
            # It had arrived although its answer was lost, or somebody else uploads the same file just now.
            return await self._one(Upload, "GET", path)

    async def _finish(self, upload_id: str, params: dict[str, str], on_progress: OnProgress | None) -> Dataset:
        headers = {"Idempotency-Key": str(uuid.uuid4())}

        async def attempt() -> httpx.Response:
            return await self._post({**params, "upload": upload_id}, headers)

        async def look() -> None:
            request = self._http.build_request("GET", f"/uploads/{upload_id}", timeout=10)
            with suppress(httpx.TransportError):
                response = await self._send_once(request)
                if response.is_success and on_progress is not None:
                    on_progress(UploadProgress("read", self._read(Upload, response.content).rows_read, None))

        async with self._meanwhile(look if on_progress else None, _LOOK_SECONDS):
            while True:
                try:
                    response = await self._send("POST", attempt, retries=2 * self._retries)
                    return self._read(Dataset, response.content)
                except WinnowError as error:
                    # What an earlier attempt began, whose connection broke, goes on; its answer is then ours.
                    if error.code != "upload_in_use":
                        raise
                await self._sleep(_IN_USE_SECONDS)

    async def _post(self, params: dict[str, str], headers: dict[str, str], **content: Any) -> httpx.Response:
        # The response comes once every row was checked, which may take minutes.
        timeout = httpx.Timeout(self._http.timeout.connect, read=None)
        request = self._http.build_request(
            "POST", "/datasets", params=params, headers=headers, timeout=timeout, **content
        )
        return await self._send_once(request)


def _ignore(_: UploadProgress) -> None:
    pass


@contextmanager
def _opened(source: Source) -> Iterator[IO[bytes]]:
    """
    Raises:
        ValueError: it can be read only once.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        if not file.seekable():
            raise ValueError(
                "a pipe cannot be read again after a broken connection; write it to a file, and upload that"
            )
        yield file


def _pieces(
    file: IO[bytes], start: int, size: int, done: Callable[[int], object], piece_bytes: int = _PIECE_BYTES
) -> Iterator[bytes]:
    """So many bytes of the file; `done` gets how many of them were taken.

    Raises:
        ValueError: the file has become shorter.
    """
    file.seek(start)
    taken = 0
    while taken < size:
        piece = file.read(min(piece_bytes, size - taken))
        if not piece:
            raise ValueError("the file has become shorter while it was uploaded; upload it again once it is complete")
        yield piece
        taken += len(piece)
        done(taken)
