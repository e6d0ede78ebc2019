"""A browser without a picture: what it sends and keeps, over a client of tests."""

import re
from typing import Any

import httpx
from fastapi.testclient import TestClient

from support.world import World

HTML = {"accept": "text/html"}


class Visitor:
    """Visits pages with the cookies that it was given; `login` makes it one of the first tenant's."""

    def __init__(self, world: World, scheme: str = "http") -> None:
        self._client = TestClient(world.app, base_url=f"{scheme}://testserver", follow_redirects=False, headers=HTML)

    @property
    def cookies(self) -> httpx.Cookies:
        return self._client.cookies

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self._client.get(path, **more)

    def post(self, path: str, data: dict[str, Any] | None = None, **more: Any) -> httpx.Response:
        return self._client.post(path, data=data, **more)

    def login(self, key: str) -> httpx.Response:
        return self.post("/login", {"key": key})

    def form_token(self, path: str = "/jobs") -> str:
        """As the forms of the page hold it."""
        found = re.search(r'name="form_token" value="([0-9a-f]{64})"', self.get(path).text)
        assert found is not None
        return found[1]

    def send(self, path: str, data: dict[str, Any] | None = None) -> httpx.Response:
        """A form of a page."""
        return self.post(path, {"form_token": self.form_token(), **(data or {})})


def visitor(world: World, key: str | None = None) -> Visitor:
    """One who has logged in, by default with the key of the first tenant."""
    found = Visitor(world)
    assert found.login(key or world.key).status_code == 303
    return found
