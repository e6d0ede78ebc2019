"""The pages of a finished job: what they say, whom they say it to, and how much they weigh."""

import gzip
import json
import re
from collections.abc import Iterator

import pytest
from support.charts import largest_charts
from support.result_pages import LONG, K, N, Shown, shown_results
from support.web import Visitor
from support.world import make_settings

from service.results.chart_schemas import MAX_TARGETS
from service.results.presets import Preset

PAGES = ("results", "targets", "map", "samples", "samples?index=2", "samples/2/text", "samples/2/rendered", "compare")
PAGES = (*PAGES, "provenance", "provenance?check=true", "provenance.json", "export?format=csv")


@pytest.fixture(scope="module")
def shown(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("pages")
    with shown_results(make_settings(postgres_url, folder), folder) as shown:
        yield shown


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_for_its_tenant_alone(shown: Shown, path: str) -> None:
    assert shown.me.get(f"/jobs/{shown.job}/{path}").status_code == 200
    assert shown.me.get(f"/jobs/{shown.foreign}/{path}").status_code == 404
    assert Visitor(shown.world).get(f"/jobs/{shown.job}/{path}").headers["location"].startswith("/login?")


@pytest.mark.parametrize("path", PAGES)
def test_what_users_wrote_is_text_and_nothing_is_inline(shown: Shown, path: str) -> None:
    answer = shown.me.get(f"/jobs/{shown.job}/{path}")
    if answer.headers["content-type"].startswith("text/html"):
        assert "<script>alert" not in answer.text
        assert not re.search(r"\sstyle=|\son\w+=|<style", answer.text)
        assert re.findall(r"<script(?! src=\"/static/)[^>]*>", answer.text) in (
            [],
            ['<script type="application/json" id="recut-data">'],
        )
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_the_verdict_comes_first_with_what_to_do(shown: Shown) -> None:
    page = shown.page("results")
    verdict, pictures = page.index('id="verdict"'), page.index("<figure")
    assert verdict < page.index("Advice") < pictures
    assert '<span class="badge bad">bad</span>' in page
    assert {"chart-influence", "chart-sources", "chart-landmarks", "chart-shortlist", "chart-validation"} <= set(
        re.findall(r'<figure class="chart" id="([\w-]+)"', page)
    )


def test_the_largest_result_weighs_less_than_200_kilobytes(shown: Shown) -> None:
    page = shown.page("results")
    assets = "".join(shown.me.get(path).text for path in set(re.findall(r'(?:src|href)="(/static/[^"]+)"', page)))
    assert len((page + assets).encode()) < 500_000
    assert len(gzip.compress((page + assets).encode())) < 100_000


@pytest.mark.parametrize(("asked", "count"), [("", K), ("?budget=1", 1), ("?budget=50%25", 20), ("?budget=9999", N)])
def test_another_budget_is_cut_without_a_script(shown: Shown, asked: str, count: int) -> None:
    page = shown.page(f"results{asked}")
    data = json.loads(re.findall(r'id="recut-data">(.*?)</script>', page)[0])
    place = data["count"].index(count)
    assert f'<span id="recut-count">{count}</span>' in page
    assert f'id="recut-mean">{data["mean"][place]}<' in page
    sources = re.findall(r'data-count="\d+">([\d,]+)<', page)
    assert [int(each) for each in sources] == [counts[place] for counts in data["sources"]]
    assert sum(map(int, sources)) == count


@pytest.mark.parametrize("budget", ["two", "", "nan", "1e999", "%"])
def test_a_budget_that_is_no_number_is_refused(shown: Shown, budget: str) -> None:
    answer = shown.me.get(f"/jobs/{shown.job}/results", params={"budget": budget})
    assert answer.status_code == 422
    assert "2%" in answer.text


def test_points_of_the_map_are_samples_of_the_pool(shown: Shown) -> None:
    points = shown.me.get(f"/jobs/{shown.job}/map").json()
    stored = largest_charts(N, budget=K).map
    assert stored is not None
    assert [point[2] for point in points] == stored.index
    assert all(0 <= x <= 420 and 0 <= y <= 380 for x, y, *_ in points)


def test_the_result_shows_some_targets_and_their_page_all(shown: Shown) -> None:
    assert shown.page("results").count("target 7 ") == 1
    assert shown.page("targets").count("<tr>") == MAX_TARGETS + 1


def test_a_result_of_an_earlier_version_says_why_there_are_no_pictures(shown: Shown) -> None:
    answer = shown.me.get(f"/jobs/{shown.other}/results")
    assert answer.status_code == 200
    assert "<figure" not in answer.text
    assert shown.me.get(f"/jobs/{shown.other}/map").json() == []
    assert shown.me.get(f"/jobs/{shown.other}/targets").status_code == 200


def test_a_download_is_that_of_the_api(shown: Shown) -> None:
    path = f"{shown.job}/export?format=csv&selected_only=true"
    api = shown.world.client.get(f"/v1/selection-jobs/{path}")
    page = shown.me.get(f"/jobs/{path}")
    assert page.content == api.content
    assert page.headers["content-disposition"] == api.headers["content-disposition"]
    with_texts = shown.me.get(f"/jobs/{shown.job}/export?format=jsonl&include=messages")
    assert json.loads(with_texts.text.splitlines()[0])["messages"][0]["role"] == "user"


def test_the_page_offers_every_preset(shown: Shown) -> None:
    for preset in Preset:
        assert f"/jobs/{shown.job}/export?preset={preset}" in shown.page("results")
    api = shown.world.client.get(f"/v1/selection-jobs/{shown.job}/export?preset=trl")
    page = shown.me.get(f"/jobs/{shown.job}/export?preset=trl")
    assert (page.status_code, page.content) == (200, api.content)
    assert json.loads(page.text.splitlines()[0]).keys() == {"prompt", "completion"}


def test_two_jobs_beside_each_other(shown: Shown) -> None:
    page = shown.page(f"compare?with={shown.other}")
    assert "<dd>2 " in page, "two samples that both selected"
    assert "28.6%" in page, "of the seven that any did"
    assert re.search(
        r"<code>budget</code></th><td><bdi class=\"user\">6</bdi></td><td><bdi class=\"user\">3</bdi>", page
    )
    assert shown.me.get(f"/jobs/{shown.job}/compare?with={shown.foreign}").status_code == 404
    assert shown.me.get(f"/jobs/{shown.job}/compare?with=nothing").status_code == 404
    assert shown.other in shown.page("compare"), "it is offered"


def test_the_record_and_the_check_of_what_is_stored(shown: Shown) -> None:
    page = shown.page("provenance?check=true")
    record = shown.world.client.get(f"/v1/selection-jobs/{shown.job}/provenance").json()
    assert record["weights_root"] in page
    assert "message ok" in page
    assert "message ok" not in shown.page("provenance")
    assert json.loads(shown.page("provenance.json"))["record"] == record["record"]


def test_samples_are_listed_by_rank_or_in_the_order_of_the_pool(shown: Shown) -> None:
    def indices(page: str) -> list[int]:
        return [int(index) for index in re.findall(r"&amp;index=(\d+)#sample", page)]

    assert indices(shown.page("samples")) == [39, 38, 37, 36, 35, 34]
    first = shown.page("samples?show=all")
    assert indices(first) == list(range(20))
    assert "after=19" in first
    last = shown.page("samples?show=all&after=19&index=2")
    assert indices(last) == list(range(20, 40))
    assert 'rel="next"' not in last
    assert 'id="sample"' in last
    assert len(first) < 40_000, "long texts begin only"
    assert indices(shown.page("samples?show=all&after=39")) == []


def test_samples_are_searched_filtered_and_put_in_another_order(shown: Shown) -> None:
    def indices(query: str) -> list[int]:
        page = shown.page(f"samples?{query}")
        return [int(index) for index in re.findall(r"&amp;index=(\d+)#sample", page)]

    assert indices("text=LONGLONG&show=all") == [3]
    assert indices("text=LONGLONG") == []
    assert indices("show=all&sort=influence&text=&source=&exact=")[:3] == [39, 38, 37]
    assert indices("show=all&sort=influence.asc")[:6] == [0, 1, 2, 3, 4, 6]  # 5 has no influence
    assert indices("show=all&source=of%20none") == []
    following = re.search(r'href="([^"]*)" rel="next"', shown.page("samples?show=all&sort=influence"))
    assert following is not None
    query = following[1].replace("&amp;", "&").partition("?")[2]
    assert indices(query) == [*range(19, 5, -1), *range(4, -1, -1), 5]
    assert shown.me.get(f"/jobs/{shown.job}/samples?sort=rank").status_code == 422


def test_a_sample_is_read_with_its_roles_and_a_long_one_in_part(shown: Shown) -> None:
    page = shown.page("samples?index=2")
    assert page.count('class="turn') == 2
    assert page.count('class="turn counts"') == 1
    long = shown.page("samples?index=3")
    assert len(long) < 30_000
    assert f"/jobs/{shown.job}/samples/3/text" in long
    whole = shown.me.get(f"/jobs/{shown.job}/samples/3/text")
    assert whole.headers["content-type"] == "text/plain; charset=utf-8"
    assert "long" * LONG in whole.text
    assert shown.me.get(f"/jobs/{shown.job}/samples?index={N}").status_code == 404
    assert shown.me.get(f"/jobs/{shown.job}/samples/{N}/rendered").status_code == 404


def test_what_a_worker_is_yet_to_render_is_waited_for(shown: Shown) -> None:
    answer = shown.me.get(f"/jobs/{shown.job}/samples/2/rendered")
    assert answer.headers["x-final"] in ("true", "false")
    assert "<html" not in answer.text
