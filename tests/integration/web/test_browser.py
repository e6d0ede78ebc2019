"""The pages in a real Chromium: from the login by way of upload, submission and watching to the logout; without a script; for
everybody, in every colour, in a narrow window; and nothing hostile becomes more than text."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from support.browser import NARROW, Tab, chromium, tab
from support.processes import Process, running
from support.servers import Servers
from support.tiny import pool_rows, target_rows
from support.worker_jobs import MODEL, computing_world
from support.world import SECRET, World, serving

from service.auth import browsers

ROWS, TARGETS = 40, 4
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\u202egnp.exe"
PAGE_BYTES = 200_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def world(
    browser: Browser, servers: Servers, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> Iterator[World]:
    with computing_world(servers, tmp_path_factory.mktemp("browser"), tiny_llama) as made:
        yield made


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    with serving(world.app) as url:
        yield url


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pool and a target."""
    folder = tmp_path_factory.mktemp("files")
    for name, rows in (("pool", pool_rows(ROWS)), ("target", target_rows(TARGETS, "python_function"))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pool.jsonl", folder / "target.jsonl"


@pytest.fixture
def one(browser: Browser, url: str, world: World) -> Iterator[Tab]:
    """Logged in as the first tenant."""
    with tab(browser, url) as opened:
        opened.login(world.key)
        yield opened


@pytest.fixture(scope="module")
def queued(world: World) -> str:
    """A job that nobody computes, with a name that is hostile and a pool with texts that are."""
    hostile = [{"id": f"<b>{i}</b>", "source": "<i>", "prompt": HOSTILE, "completion": HOSTILE} for i in range(3)]
    pool = world.upload([*hostile, {"prompt": "p", "completion": "x" * 900_000}], "<u>pool</u>")
    names = {"name": "<u>name</u>", "labels": {"team": "search"}}
    return world.post(
        model=MODEL, pool=pool, target=pool, budget=2, **names, metadata={"<b>": "<script>alert(1)</script>"}
    )


def fill(one: Tab, files: tuple[Path, Path]) -> None:
    """The form of a new job, with data that is uploaded there."""
    page = one.page
    page.goto("/jobs/new")
    for role, file, rows in (("pool", files[0], ROWS), ("target", files[1], TARGETS)):
        page.locator(f"#{role}-file").set_input_files(file)
        expect(page.locator(f"[data-role={role}] .upload-state")).to_contain_text(f"{rows} rows")
        expect(page.locator(f"#{role} option:checked")).to_contain_text(f"{file.name} ({rows} rows")
    page.get_by_label("Model").fill(MODEL)
    page.get_by_label("Budget").fill("4")
    page.get_by_text("How to compute").click()
    for name, value in (("landmarks.count", "12"), ("gradient.projection_dim", "256"), ("max_length", "64")):
        page.locator(f"[id='{name}']").fill(value)
    page.locator("[id='dtype']").select_option("float32")


@pytest.mark.slow
def test_from_the_login_to_the_end_of_a_job(
    browser: Browser, url: str, world: World, files: tuple[Path, Path], tmp_path: Path
) -> None:
    with world.sessions.begin() as session:
        link = browsers.make_link(session, world.key, SECRET)
    with running(Process.worker(world.settings, tmp_path / "worker.log")), tab(browser, url) as one:
        page = one.page
        page.goto(f"/login?link={link}")
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url("**/jobs")
        fill(one, files)
        expect(page.locator("#plan")).to_contain_text("exact_influence")  # by itself
        page.get_by_label("Budget").press("Enter")  # posts nothing
        assert page.url.endswith("/jobs/new")
        with page.expect_popup() as opened:
            page.locator("[data-role=pool]").get_by_role("button", name="Check the rows").click()
        rows = opened.value
        rows.get_by_text("what the loss counts").or_(rows.get_by_text("Look again")).first.wait_for()
        while rows.get_by_role("link", name="Look again").is_visible():
            rows.get_by_role("link", name="Look again").click()
        assert len(rows.locator("article mark").all_inner_texts()) >= 10
        rows.close()
        page.get_by_role("button", name="Post the job").click()
        page.wait_for_url("**/jobs/job_*")
        page.evaluate("window.isTheSamePage = true")
        expect(page.get_by_role("status")).to_have_text("succeeded", timeout=90_000)
        assert page.evaluate("window.isTheSamePage")
        job = page.url.rpartition("/")[2]
        expect(page.locator("#events ~ div tbody tr").first).to_contain_text("job.succeeded")
        for stage in world.get(job)["stages"]:
            expect(page.get_by_role("row").filter(has_text=stage["stage"].replace("_", " ")).first).to_contain_text(
                "done"
            )
        asked = one.asked[f"/jobs/{job}/live"]
        time.sleep(4)
        assert one.asked[f"/jobs/{job}/live"] == asked  # it stays as it is
        assert world.key not in page.content()
        page.get_by_role("button", name="Log out").click()
        page.wait_for_url("**/login")
        page.goto(f"/jobs/{job}")
        assert "/login?next=" in page.url


def test_a_cancelled_job_is_seen_to_be_so_and_can_be_retried(one: Tab, world: World) -> None:
    pool = world.upload(pool_rows(10))
    job = world.post(model=MODEL, pool=pool, target=pool, budget=2)
    page = one.page
    page.goto(f"/jobs/{job}")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("status")).to_have_text("cancelled")
    page.get_by_role("button", name="Retry").click()
    page.wait_for_url(lambda address: "/jobs/job_" in address and not address.endswith(job))
    again = page.url.rpartition("/")[2]
    assert world.get(again)["retry_of"] == job
    world.cancel(again)  # by somebody else: the open page shows it by itself
    expect(page.get_by_role("status")).to_have_text("cancelled")


def test_everything_is_done_without_a_script(
    browser: Browser, url: str, world: World, files: tuple[Path, Path]
) -> None:
    with tab(browser, url, java_script_enabled=False) as one:
        one.login(world.key)
        page = one.page
        page.goto("/jobs/new")
        page.locator("#target-file").set_input_files(files[1])
        page.locator("[data-role=target]").get_by_role("button", name="Upload").click()
        page.wait_for_url("**/jobs/new?target=*")
        target = page.locator("#target").input_value()
        page.locator("#pool").select_option(target)
        page.get_by_label("Model").fill(MODEL)
        page.get_by_label("Budget").fill("2")
        page.locator("#show-plan").click()
        expect(page.locator("#plan")).to_contain_text("rds_plus")
        page.get_by_role("button", name="Post the job").click()
        page.wait_for_url("**/jobs/job_*")
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("status")).to_have_text("cancelled")


def test_another_tenants_job_is_not_there(browser: Browser, url: str, world: World, queued: str) -> None:
    with tab(browser, url) as other:
        other.login(world.other_key)
        answer = other.page.goto(f"/jobs/{queued}")
        assert answer is not None
        assert answer.status == 404
        other.wrong = [found for found in other.wrong if "404" not in found]  # Chromium's word on it


def pages(job: str, world: World) -> list[str]:
    pool = world.get(job)["pool"]
    return [
        "/jobs",
        "/jobs/new",
        f"/jobs/{job}",
        f"/jobs/{job}/log",
        "/datasets",
        f"/datasets/{pool}",
        "/jobs?status=failed",
    ]


@pytest.mark.parametrize("look", ["light", "dark", "narrow"])
def test_pages_are_for_everybody_and_light_and_hostile_texts_are_texts(
    browser: Browser, url: str, world: World, queued: str, look: str
) -> None:
    context = {"viewport": NARROW} if look == "narrow" else {"color_scheme": look}
    with tab(browser, url, **context) as one:
        one.page.goto("/login")
        assert one.violations() == []
        one.login(world.key)
        for path in pages(queued, world):
            one.bytes = 0
            one.page.goto(path)
            if path == "/jobs/new":
                one.page.get_by_text("How to compute").click()
            assert one.violations() == [], path
            assert not one.is_wider_than_the_window, path
            assert 0 < one.bytes < PAGE_BYTES, path
        expect(one.page.locator("main")).to_contain_text("No job is as the filters say")
        one.page.goto(pages(queued, world)[5])
        assert HOSTILE in one.page.locator("article .text").first.inner_text()


def test_keys_alone_reach_everything_and_the_focus_is_seen(one: Tab) -> None:
    one.page.goto("/jobs/new")
    seen = []
    for _ in range(12):
        one.page.keyboard.press("Tab")
        seen.append(
            one.page.evaluate(
                "() => { const e = document.activeElement, s = getComputedStyle(e);"
                " return [e.id || e.textContent.trim(), s.outlineStyle, parseFloat(s.outlineWidth)]; }"
            )
        )
    names = [name for name, _, _ in seen]
    assert names[0] == "Skip to the content"
    assert {"Jobs", "New job", "pool"} <= set(names)
    assert all(style != "none" and width >= 2 for _, style, width in seen)


def test_an_open_page_asks_less_than_once_a_second_and_not_while_it_is_hidden(
    browser: Browser, url: str, world: World, queued: str
) -> None:
    with tab(browser, url) as one:
        one.page.add_init_script("Object.defineProperty(document, 'hidden', {get: () => window.isHidden === true});")
        one.login(world.key)
        one.page.wait_for_timeout(5_000)
        assert 1 <= one.asked["/jobs/rows"] <= 2
        one.page.goto(f"/jobs/{queued}")
        one.page.wait_for_timeout(5_000)
        assert 1 <= one.asked[f"/jobs/{queued}/live"] <= 4
        one.page.evaluate("window.isHidden = true; document.dispatchEvent(new Event('visibilitychange'))")
        asked = one.asked.total()
        one.page.wait_for_timeout(4_000)
        assert one.asked.total() == asked
