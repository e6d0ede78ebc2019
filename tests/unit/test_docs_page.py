"""`/docs` is a page whose every file comes from the service itself, none of it inline, as its policy demands."""

import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from support.world import make_settings

from service.app import create_app


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return TestClient(create_app(make_settings("postgresql://nobody@127.0.0.1:1/none", tmp_path)))


def test_every_file_of_the_page_is_served_from_here(client: TestClient) -> None:
    page = client.get("/docs")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["script-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    assert "unsafe" not in page.headers["content-security-policy"]
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(named) == 4
    for name in named:
        assert re.fullmatch(r"docs/[\w.-]+", name), "relative to the page, so that a proxy may serve it below a path"
        found = client.get(f"/{name}")
        assert found.status_code == 200
        kinds = {"js": "text/javascript", "css": "text/css", "png": "image/png"}
        assert found.headers["content-type"].partition(";")[0] == kinds[name.rpartition(".")[2]]
        assert found.headers["x-content-type-options"] == "nosniff"
    (url,) = re.findall(r'url: "([^"]+)"', client.get("/docs/start.js").text)
    assert client.get(f"/{url}").json()["info"]["title"] == "Winnow"


def test_nothing_of_the_page_is_inline(client: TestClient) -> None:
    page = client.get("/docs").text
    assert not re.search(r"<script[^>]*>[^<]+|<style|\son\w+=|style=", page)


@pytest.mark.parametrize("path", ["/redoc", "/docs/oauth2-redirect", "/docs/__init__.py", "/docs/..%2fmain.py"])
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404
