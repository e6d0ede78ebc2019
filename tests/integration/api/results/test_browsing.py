"""Weights and selection in other orders, filtered and searched: pages put together are what the published arrays say."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.jobs import published, write_pool
from support.results import N, Published

from service.results import browsing
from winnow.client import Winnow
from winnow.merkle import CHUNK_SIZE


def pages(world: Published, path: str, **params: Any) -> list[dict[str, Any]]:
    """All pages, put together."""
    rows: list[dict[str, Any]] = []
    after: dict[str, int] = {}
    while True:
        answer = world.fetch(path, **params, **after)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        rows += body["data"]
        if not body["has_more"]:
            return rows
        assert body["last_id"] is not None
        assert {"after": body["last_id"]} != after
        after = {"after": body["last_id"]}


def in_order(world: Published, values: np.ndarray, descending: bool, indices: np.ndarray) -> list[int]:
    """By value, those without one last, of equal ones the first of `indices` first."""
    keys = -values[indices] if descending else values[indices]
    return indices[np.argsort(keys, kind="stable")].tolist()  # NumPy sorts NaN to the end


@pytest.mark.parametrize(
    ("sort", "order", "descending"),
    [("influence", None, True), ("influence", "asc", False), ("weight", None, True), ("weight", "asc", False)],
)
def test_weights_by_value(world: Published, sort: str, order: str | None, descending: bool) -> None:
    params = {"sort": sort, "limit": 10_000} | ({"order": order} if order else {})
    found = pages(world, "weights", **params)
    values = world.influence if sort == "influence" else world.weight
    assert [row["index"] for row in found] == in_order(world, values, descending, np.arange(N))
    assert [row["id"] for row in found[:50]] == [world.ids[row["index"]] for row in found[:50]]


def test_weights_backwards(world: Published) -> None:
    found = pages(world, "weights", order="desc", limit=9_999)
    assert [row["index"] for row in found] == list(range(N))[::-1]


def test_weights_of_a_kind(world: Published) -> None:
    sources = np.array([source or "" for source in world.sources])
    is_selected = np.isin(np.arange(N), world.selected)
    is_wanted = (sources == "source 1") & world.exact & ~is_selected
    kind = {"source": "source 1", "exact": "true", "selected": "false", "limit": 300}
    assert [row["index"] for row in pages(world, "weights", **kind)] == np.flatnonzero(is_wanted).tolist()
    found = pages(world, "weights", sort="influence", **kind)
    assert [row["index"] for row in found] == in_order(world, world.influence, True, np.flatnonzero(is_wanted))
    taken = pages(world, "weights", selected="true", limit=7)
    assert [row["index"] for row in taken] == sorted(world.selected.tolist())
    assert pages(world, "weights", source="of none") == pages(world, "weights", sort="weight", source="of none") == []


@pytest.mark.parametrize("sort", ["rank", "index", "influence", "weight"])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_the_selection_in_any_order(world: Published, sort: str, order: str) -> None:
    found = pages(world, "selected", sort=sort, order=order, exact="false", limit=40)
    expected = world.selected[~world.exact[world.selected]]
    keys = {
        "rank": np.array([world.ranks().get(i, -1) for i in range(N)]),
        "index": np.arange(N),
        "influence": world.influence,
        "weight": world.weight,
    }[sort]
    assert [row["index"] for row in found] == in_order(world, keys, order == "desc", expected)


def test_of_equal_influence_none_is_left_out(world: Published, tmp_path: Path) -> None:
    """Every weight of this job is equal: a cursor that knew the value alone would skip or repeat."""
    pool = write_pool(world.store, tmp_path / "pool", [(f"{i}", None, {"text": f"t {i}"}) for i in range(30)])
    chosen = {"sources": [None] * 30, "sample_ids": [f"{i}" for i in reversed(range(30))]}
    equal = {name: np.ones(30, np.float32) for name in ("influence", "weight")}
    job_id = published(world.sessions, world.key, pool, selected=np.arange(30)[::-1], **equal, **chosen)
    for path, expected in (("weights", list(range(30))), ("selected", list(range(30))[::-1])):
        for sort in ("influence", "weight"):
            rows, after = [], {}
            while True:
                body = world.fetch(path, job_id=job_id, sort=sort, limit=4, **after).json()
                rows += [row["index"] for row in body["data"]]
                if not body["has_more"]:
                    break
                after = {"after": body["last_id"]}
            assert rows == expected, "of equal ones the first in the list's own order comes first"


@pytest.mark.parametrize("path", ["weights", "selected"])
@pytest.mark.parametrize("sort", ["index", "influence"])
def test_a_search_finds_all_in_bounded_steps(
    world: Published, monkeypatch: pytest.MonkeyPatch, path: str, sort: str
) -> None:
    monkeypatch.setattr(browsing, "SEARCHED_BYTES", 2**20)  # about a third of the pool
    monkeypatch.setattr(browsing, "SEARCHED_SELECTED", 100)
    found = pages(world, path, text="ASK 39", sort=sort, limit=50)
    among = np.sort(world.selected) if path == "selected" else np.arange(N)
    expected = np.array([i for i in among.tolist() if f"ask {i}".startswith("ask 39")])
    wanted = expected.tolist() if sort == "index" else in_order(world, world.influence, True, expected)
    assert [row["index"] for row in found] == wanted
    first = world.fetch(path, text="no sample says this", sort=sort).json()
    assert (first["data"], first["has_more"]) == ([], True)  # it has looked through a part only
    assert isinstance(first["last_id"], int)


def test_what_a_search_takes_for_said(world: Published, tmp_path: Path) -> None:
    samples = [
        {"text": 'A "quoted" word,\na line\t\\ and É'},
        {
            "messages": [
                {"role": "user", "content": "content"},
                {"role": "assistant", "content": "x", "reasoning_content": "Why"},
            ]
        },
        {"messages": [{"role": "assistant", "content": "none"}]},
    ]
    pool = write_pool(world.store, tmp_path / "pool", [(f"{i}", None, sample) for i, sample in enumerate(samples)])
    job_id = published(world.sessions, world.key, pool)

    def found(text: str) -> list[int]:
        return [row["index"] for row in world.fetch("weights", job_id=job_id, text=text).json()["data"]]

    assert found('"QUOTED" word,\nA') == [0]
    assert found("\t\\ and é") == [0]
    assert found("content") == [1]  # the key of every message's JSON is not what it says
    assert found("why") == [1]
    assert found("role") == found(".*") == found("%") == []


def test_text_comes_where_it_is_asked_for(world: Published) -> None:
    rows = world.fetch("weights", sort="influence", limit=3, include="text").json()["data"]
    assert [row["text"] for row in rows] == [f"user: ask {row['index']}\nassistant: {'é' * 9}\n" for row in rows]
    rows = world.fetch("selected", limit=3, include="text").json()["data"]
    assert [row["text"].split("\n")[0] for row in rows] == [f"user: ask {row['index']}" for row in rows]
    assert all("text" not in row for row in world.fetch("selected", limit=3).json()["data"])
    assert len(world.fetch("weights", limit=1_001, include="text").json()["data"]) == 1_000


@pytest.mark.parametrize(
    ("path", "params", "param"),
    [
        ("weights", {"sort": "rank"}, "sort"),
        ("weights", {"order": "up"}, "order"),
        ("weights", {"stream": "true", "sort": "weight"}, "sort"),
        ("weights", {"stream": "true", "text": "x"}, "text"),
        ("weights", {"sort": "influence", "after": N}, "after"),
        ("weights", {"sort": "influence", "exact": "true", "after": 11}, "after"),  # not exact
        ("selected", {"text": ""}, "text"),
        ("selected", {"text": "x" * 201}, "text"),
    ],
)
def test_what_cannot_be_asked_for_is_named(world: Published, path: str, params: dict[str, Any], param: str) -> None:
    answer = world.fetch(path, **params)
    assert (
        answer.status_code,
        answer.json()["errors"][0]["param"] if "errors" in answer.json() else answer.json()["param"],
    ) == (
        422,
        param,
    )


def test_a_large_pool_is_searched_in_its_own_order_only(world: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browsing, "MOST_SCATTERED_BYTES", 2**20)
    for path, sort in (("weights", "influence"), ("selected", "rank")):
        answer = world.fetch(path, sort=sort, text="ask")
        assert (answer.status_code, answer.json()["param"]) == (422, "text")
    assert world.fetch("weights", text="ask", selected="true").status_code == 200


def test_a_page_in_pool_order_reads_what_it_needs(world: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    weights = browsing.repository.weights

    def counted(session: Any, job_id: str, start: int, stop: int) -> Any:
        read.append((start, stop))
        return weights(session, job_id, start, stop)

    monkeypatch.setattr(browsing.repository, "weights", counted)
    world.fetch("weights", after=CHUNK_SIZE - 5, limit=10)
    assert read == [(CHUNK_SIZE - 4, CHUNK_SIZE), (CHUNK_SIZE, CHUNK_SIZE + 7)]
    read.clear()
    world.fetch("weights", exact="true", limit=10)
    assert read == [(0, CHUNK_SIZE)]


def test_the_tag_is_that_of_what_was_asked(world: Published) -> None:
    tags = {
        world.fetch("weights", **params).headers["etag"]
        for params in ({}, {"order": "desc"}, {"sort": "weight"}, {"exact": "true"}, {"text": "1"}, {"include": "text"})
    }
    assert len(tags) == 6


def test_the_client_asks_for_the_same(world: Published, url: str) -> None:
    with Winnow(url, world.key) as client:
        rows = list(islice(client.samples(world.job_id, sort="influence", exact=False, include="text"), 1_100))
        inexact = np.flatnonzero(~world.exact)
        assert [row.index for row in rows] == in_order(world, world.influence, True, inexact)[:1_100]
        assert all(row.text is not None and row.text.startswith(f"user: ask {row.index}\n") for row in rows)
        taken = list(client.job(world.job_id).results().selected(sort="weight", order="asc"))
        assert [row.index for row in taken] == in_order(world, world.weight, False, world.selected)
