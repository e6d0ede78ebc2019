"""gzip for clients that accept it. Not for Parquet, which is compressed already, nor for events, which must not be buffered."""

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.etags import GZIP_SUFFIX

_LEAST_BYTES = 1_000
_LEVEL = 5
_REFUSED = re.compile(r"gzip\s*;\s*q=0(\.0*)?\s*(,|$)")


class Compress:
    """Starlette's middleware, with a separate strong ETag for compressed responses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._compressing = GZipMiddleware(
            app,
            minimum_size=_LEAST_BYTES,
            compresslevel=_LEVEL,
            exclude_content_types=(*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/vnd.apache.parquet"),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _REFUSED.search(Headers(scope=scope).get("accept-encoding", "")):
            await self._app(scope, receive, send)
            return

        async def send_tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("content-encoding") == "gzip" and "etag" in headers:
                    headers["etag"] = f'{headers["etag"][:-1]}{GZIP_SUFFIX}"'
            await send(message)

        await self._compressing(scope, receive, send_tagged)
