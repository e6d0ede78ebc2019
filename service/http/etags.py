"""Strong ETags of immutable responses, and 304 for clients that have them already (RFC 9110, 13.1.2).

A strong tag promises the same bytes. The tag of a small answer is the hash of its bytes. That of a large one is made before its
bytes are, from all that they depend on: the Merkle root of the weights, the request, and the code that writes them.
The gzip form has a different tag, see compression.py.
"""

import hashlib
import importlib.metadata
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from service.plan.versions import source_version

GZIP_SUFFIX = "-gzip"
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {
    304: {"description": "Not modified: `If-None-Match` matches the current ETag"}
}

_LISTED = re.compile(r'(?:W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
_ANY_ITEM = re.compile(rf"\s*(?:{_LISTED.pattern})?\s*(?:,\s*(?:{_LISTED.pattern})?\s*)*")


def _writers() -> str:
    """A hash of the code that writes results: another version may write other bytes."""
    read = ("results", "datasets/storage.py", "datasets/search.py", "http/pagination.py")
    code = source_version(Path(__file__).parents[1], read)
    digest = hashlib.sha256(code.encode())
    for package in ("pyarrow", "pydantic"):
        digest.update(importlib.metadata.version(package).encode())
    digest.update(zlib.ZLIB_RUNTIME_VERSION.encode())
    return digest.hexdigest()


_WRITERS = _writers()


def make(*depends_on: object) -> str:
    """A tag for a response before it is made; `depends_on`: everything except the code that affects its bytes."""
    return of_content(repr((_WRITERS, *depends_on)).encode())


def headers(tag: str) -> dict[str, str]:
    """To be cached, but revalidated before each use: the caller's key may have been revoked, the job deleted."""
    return {"ETag": tag, "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding, Authorization"}


def not_modified(request: Request, tag: str) -> Response | None:
    """304 for a request whose `If-None-Match` lists the tag, or `*`; None: the request needs the whole response."""
    listed = ",".join(request.headers.getlist("if-none-match"))
    forms = [tag]
    if "gzip" in request.headers.get("accept-encoding", ""):
        forms.append(f'{tag[:-1]}{GZIP_SUFFIX}"')
    # The comparison is the weak one: W/ makes no difference.
    known = {f'"{found}"' for found in _LISTED.findall(listed)} if _ANY_ITEM.fullmatch(listed) else set()
    matched = tag if listed.strip() == "*" else next((form for form in forms if form in known), None)
    return None if matched is None else Response(status_code=304, headers=headers(matched))


def answer(request: Request, tag: str, make_body: Callable[[], BaseModel]) -> Response:
    """304, or the result of `make_body` as JSON with the tag."""
    return not_modified(request, tag) or _json(make_body().model_dump_json().encode(), tag)


def answer_by_content(request: Request, body: BaseModel) -> Response:
    """304, or the body as JSON with a tag of its bytes."""
    content = body.model_dump_json().encode()
    tag = of_content(content)
    return not_modified(request, tag) or _json(content, tag)


def _json(content: bytes, tag: str) -> Response:
    return Response(content, media_type="application/json", headers=headers(tag))


def of_content(content: bytes) -> str:
    """The tag of a small answer."""
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'
