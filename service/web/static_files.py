"""Styles, scripts and pictures of the pages, below addresses that change with their content, so that browsers keep them."""

import hashlib
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter
from fastapi.responses import Response

from service.http.errors import NotFound

router = APIRouter(prefix="/static", include_in_schema=False)

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_KEPT = "public, max-age=31536000, immutable"


@cache
def _contents() -> dict[str, bytes]:
    folder = files("service.web") / "static"
    return {item.name: item.read_bytes() for item in folder.iterdir() if PurePosixPath(item.name).suffix in _TYPES}


@cache
def _digest(name: str) -> str:
    return hashlib.sha256(_contents()[name]).hexdigest()[:16]


def address(name: str) -> str:
    """Where the file is served."""
    return f"/static/{_digest(name)}/{name}"


@router.get("/{digest}/{name}")
async def static_file(digest: str, name: str) -> Response:
    """During an upgrade a page may be of another version than the process that is asked for its files: what that one has serves,
    but is not kept."""
    if name not in _contents():
        raise NotFound(f"No file {name!r}.")
    headers = {"Cache-Control": _KEPT if digest == _digest(name) else "no-store"}
    return Response(_contents()[name], media_type=_TYPES[PurePosixPath(name).suffix], headers=headers)
