"""The pages of a finished job in a real Chromium: the slider, the map, the search, the explanation, the comparison."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect
from support.browser import NARROW, Tab, chromium, tab
from support.charts import HOSTILE
from support.result_pages import Shown, shown_results
from support.world import make_settings, serving

LOOKS = {"light": {"color_scheme": "light"}, "dark": {"color_scheme": "dark"}, "narrow": {"viewport": NARROW}}
PAGES = ("results", "targets", "samples", "samples?index=2", "compare", "provenance?check=true")
PAGE_BYTES = 200_000  # as they are sent


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def shown(browser: Browser, postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("results")
    with shown_results(make_settings(postgres_url, folder), folder) as shown:
        yield shown


@pytest.fixture(scope="module")
def url(shown: Shown) -> Iterator[str]:
    with serving(shown.world.app) as url:
        yield url


@pytest.fixture
def one(browser: Browser, url: str, shown: Shown) -> Iterator[Tab]:
    with tab(browser, url) as opened:
        opened.login(shown.world.key)
        yield opened


def test_the_slider_cuts_again_without_asking_the_server(one: Tab, shown: Shown) -> None:
    page = one.page
    page.goto(f"/jobs/{shown.job}/results")
    slider = page.get_by_role("slider", name="Budget")
    before = page.locator("#recut-count").inner_text(), page.locator("#recut-mean").inner_text()
    page.wait_for_load_state("networkidle")
    asked = one.asked.total()
    slider.focus()
    page.keyboard.press("Home")
    least = page.locator("#recut-count").inner_text(), page.locator("#recut-mean").inner_text()
    page.keyboard.press("End")
    most = page.locator("#recut-count").inner_text()
    assert int(least[0].replace(",", "")) < int(before[0].replace(",", "")) <= int(most.replace(",", ""))
    assert least[1] != before[1]
    assert slider.get_attribute("aria-valuetext") == f"{most} samples"
    assert page.get_by_label("Budget: samples").input_value() == most.replace(",", "")
    assert one.asked.total() == asked


def test_the_slider_and_the_server_say_the_same(browser: Browser, url: str, shown: Shown) -> None:
    found = []
    for script in (True, False):
        with tab(browser, url, java_script_enabled=script) as one:
            one.login(shown.world.key)
            one.page.goto(f"/jobs/{shown.job}/results")
            one.page.get_by_label("Budget: samples").fill("50%")
            one.page.get_by_role("button", name="Cut").click()
            one.page.wait_for_load_state()
            found.append(
                [one.page.locator(f"#recut-{name}").inner_text() for name in ("count", "share", "mean", "exact")]
            )
    assert found[0] == found[1]


def test_a_sample_is_searched_read_and_explained(one: Tab, shown: Shown) -> None:
    page = one.page
    page.goto(f"/jobs/{shown.job}/results")
    page.get_by_role("link", name="Samples").first.click()
    expect(page.locator("ol.samples > li")).to_have_count(6)
    page.get_by_role("link", name="All samples").click()
    page.get_by_label("Says").fill("LongLong")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("ol.samples > li")).to_have_count(1)
    page.get_by_label("Says").fill("")
    page.get_by_label("Order").select_option(label="most influence")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("ol.samples > li").first).to_contain_text("39")
    page.locator("ol.samples a").nth(1).click()
    expect(page.get_by_role("heading", name="Sample 38")).to_be_visible()
    expect(page.locator("article .turn.counts")).to_contain_text("yes")
    assert HOSTILE in page.locator("article .said").first.inner_text()
    expect(page.get_by_role("heading", name="Why it has this influence")).to_be_visible()
    assert page.get_by_label("Order").input_value() == "influence"  # the list stays as it was asked for


def test_two_jobs_are_compared(one: Tab, shown: Shown) -> None:
    page = one.page
    page.goto(f"/jobs/{shown.job}/compare")
    page.get_by_label("Compare with the job").fill(shown.other)
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("heading", name="This job and")).to_be_visible()
    expect(page.locator("main")).to_contain_text("budget")  # which differs


def test_another_tenants_result_is_not_there(one: Tab, shown: Shown) -> None:
    for path in PAGES:
        answer = one.page.goto(f"/jobs/{shown.foreign}/{path}")
        assert answer is not None
        assert answer.status == 404, path
    one.wrong = [found for found in one.wrong if "404" not in found]  # Chromium's word on it


@pytest.mark.parametrize("look", LOOKS)
def test_pages_of_a_result_are_for_everybody_and_light(browser: Browser, url: str, shown: Shown, look: str) -> None:
    with tab(browser, url, **LOOKS[look]) as one:
        one.login(shown.world.key)
        for path in PAGES:
            one.bytes = 0
            one.page.goto(f"/jobs/{shown.job}/{path}")
            assert one.violations() == [], path
            assert not one.is_wider_than_the_window, path
            assert 0 < one.bytes < PAGE_BYTES, path
