"""Receives the body of an upload, raw or as multipart/form-data, in a temporary file, never more than the budget."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from tempfile import TemporaryFile
from typing import IO

from anyio import CancelScope
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from service.http.errors import BadRequest, TooLarge
from service.settings import UploadSettings

_WRITE_BYTES = 2**20


@asynccontextmanager
async def received(request: Request, limits: UploadSettings) -> AsyncIterator[tuple[IO[bytes], str]]:
    """The uploaded file, whole, for as long as the context lasts, and the name that the form gives it, "" if none does.

    Raises:
        TooLarge: the body is larger than the budget; where its Content-Length says so, none of it is read.
        BadRequest: the body ended early, its sender fell silent, or the form does not hold one part, a file named `file`.
    """
    max_bytes = limits.max_bytes
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    stream = _within_budget(request, limits)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    receive = _form_file(request.headers, stream) if media_type == "multipart/form-data" else _raw_file(stream)
    async with receive as found:
        yield found


async def _within_budget(request: Request, limits: UploadSettings) -> AsyncGenerator[bytes, None]:
    seen, chunks = 0, request.stream()
    try:
        while True:
            async with asyncio.timeout(limits.idle_seconds):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            seen += len(chunk)
            if seen > limits.max_bytes:
                raise _too_large(limits.max_bytes)
            yield chunk
    except ClientDisconnect as error:
        raise BadRequest("The upload was aborted before its end; send it again.") from error
    except TimeoutError as error:
        raise BadRequest(f"No data arrived for {limits.idle_seconds:g} seconds; send the upload again.") from error


@asynccontextmanager
async def _raw_file(stream: AsyncGenerator[bytes, None]) -> AsyncIterator[tuple[IO[bytes], str]]:
    file = await asyncio.to_thread(lambda: TemporaryFile(prefix="winnow-"))  # noqa: SIM115  # it is closed below
    try:
        # Off the event loop, a megabyte at a time: a thread for each network packet costs more than the writing.
        buffer = bytearray()
        async for chunk in stream:
            buffer += chunk
            if len(buffer) >= _WRITE_BYTES:
                await asyncio.to_thread(file.write, bytes(buffer))
                buffer.clear()
        await asyncio.to_thread(file.write, bytes(buffer))
        yield file, ""
    finally:
        with CancelScope(shield=True):
            await asyncio.to_thread(file.close)  # with which a large file goes, and that takes its time


@asynccontextmanager
async def _form_file(headers: Headers, stream: AsyncGenerator[bytes, None]) -> AsyncIterator[tuple[IO[bytes], str]]:
    try:
        form = await MultiPartParser(headers, stream, max_files=1, max_fields=0).parse()
    except MultiPartException as error:
        raise BadRequest(f"{error.message} Send one part, a file named `file`.", param="file") from error
    try:
        part = form.get("file")
        if not isinstance(part, UploadFile):
            raise BadRequest("The form has no file named `file`; send the file as a part with that name.", param="file")
        yield part.file, part.filename or ""
    finally:
        await form.close()


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"The upload is larger than {max_bytes:,} bytes; compress it with gzip or split it", code="upload_too_large"
    )
