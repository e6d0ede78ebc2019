"""The documentation as a site: built without a warning, complete in itself, every file from its own host."""

import os
import re
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from support.browser import chromium, tab
from support.loopback import Quiet, answering

from service.settings import ApiSettings

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]*)"|<link\b[^>]*\bhref="([^"]*)"|url\(["']?([^"')]+)|@import\s+["']([^"']+)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_no_page_loads_anything_of_another_host(site: Path) -> None:
    loaded = [
        next(filter(None, found))
        for path in [*site.rglob("*.html"), *site.rglob("*.css")]
        for found in _LOADED.findall(path.read_text())
    ]
    assert len(loaded) > 100
    assert [name for name in loaded if re.match(r"(?!data:)\w+:|//", name)] == []


def test_a_browser_asks_no_other_host(site: Path) -> None:
    """Also for what scripts load: `tab` fails where it is asked for."""
    with chromium() as browser, answering(partial(_Files, directory=str(site))) as url, tab(browser, url) as opened:
        for path in ("/", "/reference/api/", "/reference/python/", "/results/"):
            opened.page.goto(path)
            opened.page.wait_for_load_state("networkidle")
        opened.page.goto("/?q=landmark")  # searches once it can, as words typed before the script listens would not
        opened.page.locator(".md-search-result__item").first.wait_for()


def test_every_setting_and_every_call_has_its_place(site: Path) -> None:
    settings = (site / "reference/settings/index.html").read_text()
    for name in ApiSettings.model_fields:
        assert f"WINNOW_{name.upper()}" in settings
    calls = (site / "reference/api/index.html").read_text()
    assert "POST /v1/selection-jobs" in calls
    objects = (site / "reference/objects/index.html").read_text()
    links = set(re.findall(r'href="\.\./objects/#([^"]+)"', calls)) | set(re.findall(r'href="#([^"]+)"', objects))
    assert len(links) > 100
    assert [name for name in links if f'id="{name}"' not in objects] == []
    assert 'id="winnow.Winnow.upload_dataset"' in (site / "reference/python/index.html").read_text()


class _Files(Quiet, SimpleHTTPRequestHandler):
    pass
