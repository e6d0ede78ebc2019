"""Pictures of the pages for docs/screenshots, of the demo's data: `make screenshots`. Needs Chromium.

The demo's stack is used if it runs, or started and stopped again.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from service.local import demo as demo_run
from service.local.stack import login_address
from winnow.client import Winnow
from winnow.stack import DEFAULT_HOME, Stack, running_stack

OUT = Path(__file__).parents[1] / "docs" / "screenshots"
LOOKS = {
    "light": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}
MOST_HEIGHT = 1_600  # of a picture


@contextmanager
def demo() -> Iterator[Stack]:
    """A stack on which the demo has run."""
    was_running = running_stack(DEFAULT_HOME) is not None
    winnow = Path(sys.executable).with_name("winnow")
    subprocess.run([winnow, "demo", "--keep"], check=True)
    try:
        stack = running_stack(DEFAULT_HOME)
        assert stack is not None, "the demo has left it running"
        yield stack
    finally:
        if not was_running:
            subprocess.run([winnow, "down"], check=True)


def pages(stack: Stack) -> dict[str, str]:
    """By the name of the picture."""
    with Winnow(stack.url, stack.api_key) as client:
        job = next(job for job in client.jobs(status="succeeded") if job["name"] == demo_run.REQUEST["name"])
        data = {"model": job["model"]["name"], "pool": job["pool"], "target": job["target"]}
        other = client.create_job(**data, budget=30, name="Half the budget")  # to be compared; it computes little anew
        client.wait(other["id"])
        first = next(client.selected(job["id"]))
    chosen = urlencode({**data, "budget": 60})
    return {
        "jobs": "/jobs",
        "new-job": f"/jobs/new?{chosen}",
        "job": f"/jobs/{job['id']}",
        "result": f"/jobs/{job['id']}/results",
        "targets": f"/jobs/{job['id']}/targets",
        "samples": f"/jobs/{job['id']}/samples",
        "sample": f"/jobs/{job['id']}/samples?index={first.index}",
        "compare": f"/jobs/{job['id']}/compare?with={other['id']}",
        "provenance": f"/jobs/{job['id']}/provenance",
        "datasets": "/datasets",
        "rows": f"/datasets/{job['pool']}?model={job['model']['name']}",
        "usage": "/usage",
        "keys": "/keys",
        "workers": "/workers",
    }


def take(page: Page, name: str, path: str, into: Path) -> None:
    page.goto(path)
    page.wait_for_load_state("networkidle")
    while page.get_by_role("link", name="Look again").is_visible():  # a worker has yet to render the rows
        page.get_by_role("link", name="Look again").click()
    if name == "sample":
        page.locator("[data-from$=rendered] mark").first.wait_for(timeout=300_000)  # by a worker
    if name == "new-job":
        page.locator("#plan .figures").wait_for()
    width, height = page.evaluate("[innerWidth, document.documentElement.scrollHeight]")
    page.screenshot(
        path=into, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": min(height, MOST_HEIGHT)}
    )


def main() -> None:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        sys.exit("no Chromium is installed; set CHROMIUM")
    OUT.mkdir(exist_ok=True)
    with demo() as stack, sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        shown = pages(stack)
        for look in LOOKS:
            pictures(browser, stack, shown, look)
        browser.close()
    for picture in OUT.glob("*.png"):
        with Image.open(picture) as image:  # a third of the bytes, and nothing that an eye sees
            image.convert("RGB").quantize(128).save(picture, optimize=True)


def pictures(browser: Browser, stack: Stack, shown: dict[str, str], look: str) -> None:
    context = browser.new_context(base_url=stack.url, **LOOKS[look])
    page = context.new_page()
    page.goto(login_address(stack))
    page.screenshot(path=OUT / f"login-{look}.png")
    page.get_by_role("button", name="Log in").click()
    for name, path in shown.items():
        take(page, name, path, OUT / f"{name}-{look}.png")
    context.close()


if __name__ == "__main__":
    main()
