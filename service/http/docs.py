"""`/docs`: the OpenAPI document to read and try in a browser, by Swagger UI with all its files from here, none of them inline."""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response

from service.http.errors import NotFound

router = APIRouter(prefix="/docs", include_in_schema=False)

_POLICY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}
_FOLDER = Path(str(files("fastapi_swagger") / "resources"))
_FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
# Addresses are relative to the page's own, which may be below a path of a proxy's.
_START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true});'
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Winnow API</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="docs/favicon-32x32.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""


@router.get("")
async def page() -> HTMLResponse:
    return HTMLResponse(_PAGE, headers=_POLICY)


@router.get("/start.js")
async def start() -> Response:
    return Response(_START, media_type="text/javascript")


@router.get("/{name}")
async def file(name: str) -> FileResponse:
    if name not in _FILES:
        raise NotFound(f"No file {name!r}.")
    return FileResponse(_FOLDER / name, media_type=_FILES[name])
