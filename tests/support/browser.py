"""A real Chromium, and what it must never do: complain, ask another host, or open a dialog."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Response, sync_playwright

NARROW = {"width": 390, "height": 844}
WIDE = {"width": 1280, "height": 900}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none; CHROMIUM names another than the one on the path."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium is installed: apt-get install chromium, or set CHROMIUM")
    with sync_playwright() as playwright:
        # Whoever is root has no sandbox; pages of these tests are our own.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


class Tab:
    """A page of a new context at a service's URL, and what was seen of it."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        self.url = url
        self._context: BrowserContext = browser.new_context(base_url=url, **{"viewport": WIDE, **context})
        self._context.set_default_timeout(30_000)
        self.asked: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.bytes = 0
        self._context.on("page", self._watch)
        self.page: Page = self._context.new_page()

    def _watch(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self._requested(request.url))
        page.on("response", self._answered)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(f"console: {message.text} at {message.location}")

    def _requested(self, address: str) -> None:
        parts = urlsplit(address)
        self.asked[parts.path] += 1
        if parts.scheme not in ("blob", "data") and f"{parts.scheme}://{parts.netloc}" != self.url:
            self.wrong.append(f"another host: {address}")

    def _answered(self, answer: Response) -> None:
        self.bytes += int(answer.headers.get("content-length", 0))

    def login(self, key: str) -> None:
        self.page.goto("/login")
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Log in").click()
        self.page.wait_for_url("**/jobs")

    def violations(self) -> list[str]:
        """What axe-core finds that is serious, of the page as it is."""
        found = Axe().run(self.page).response["violations"]
        return [
            f"{one['id']}: {node['html'][:200]} {node.get('failureSummary', '')}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]

    @property
    def is_wider_than_the_window(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth"))

    def close(self) -> None:
        self._context.close()


@contextmanager
def tab(browser: Browser, url: str, **context: Any) -> Iterator[Tab]:
    """Fails at its end if the browser has complained about anything."""
    opened = Tab(browser, url, **context)
    try:
        yield opened
    finally:
        opened.close()  # or the server would wait for the end of what the page listens to
    assert opened.wrong == []
