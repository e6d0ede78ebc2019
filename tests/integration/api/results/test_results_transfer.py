"""How results are sent: ETags and 304, compression, and to how many clients at a time."""

from contextlib import ExitStack
from typing import Any

import pytest
from support.results import N, Published
from support.shares import holding

from service.results import repository
from winnow.client import Winnow

# Of two whose content differs by one parameter alone, the tags differ by that one.
CACHED = [
    "results",
    "provenance",
    *("weights", "weights?after=5", "weights?limit=3", "weights?stream=true", "weights?stream=true&after=39990"),
    *("selected", "selected?after=5", "selected?limit=3"),
    *("export?format=jsonl", "export?format=jsonl&selected_only=true", "export?format=csv&selected_only=true"),
    *("export?format=parquet", "export?format=parquet&include=messages"),
    "",
]


def fetch(world: Published, path: str, **headers: str) -> Any:
    headers = {"Authorization": f"Bearer {world.key}"} | {name.replace("_", "-"): v for name, v in headers.items()}
    return world.client.get(f"/v1/selection-jobs/{world.job_id}/{path}".rstrip("/"), headers=headers)


def test_who_has_a_result_is_not_sent_it_again(world: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {path: fetch(world, path, Accept_Encoding="identity") for path in CACHED}
    tags = [answer.headers["etag"] for answer in whole.values()]
    assert len(set(tags)) == len(tags)
    for path, answer in whole.items():
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "private, no-cache")
        assert "Accept-Encoding" in answer.headers["vary"]
        same = fetch(world, path, Accept_Encoding="identity")
        assert (same.content, same.headers["etag"]) == (answer.content, answer.headers["etag"])

    def read(*_: object) -> None:
        raise AssertionError("nothing is read for who has it")

    for name in ("weights", "selected_after"):
        monkeypatch.setattr(repository, name, read)
    for path, answer in whole.items():
        for sent in (answer.headers["etag"], f'"x", W/{answer.headers["etag"]}', "*"):
            unchanged = fetch(world, path, If_None_Match=sent)
            assert (unchanged.status_code, unchanged.content) == (304, b"")
            assert unchanged.headers["etag"] == answer.headers["etag"]
            assert unchanged.headers["x-request-id"]
    for path in ("results", "export?format=jsonl", "weights"):
        foreign = fetch(world, path, If_None_Match="*", Authorization=f"Bearer {world.other_key}")
        assert foreign.status_code == 404


@pytest.mark.parametrize("sent", ['"other"', "", "no tag", '"gzip'])
def test_who_has_something_else_gets_it_all(world: Published, sent: str) -> None:
    assert fetch(world, "results", If_None_Match=sent).status_code == 200


@pytest.mark.parametrize("path", ["results", "weights", "weights?stream=true", "export?format=csv"])
def test_what_is_compressed_is_the_same_under_a_tag_of_its_own(world: Published, path: str) -> None:
    plain, small = (fetch(world, path, Accept_Encoding=how) for how in ("identity", "gzip"))
    assert small.headers["content-encoding"] == "gzip"
    assert small.content == plain.content
    assert small.headers["etag"] == plain.headers["etag"][:-1] + '-gzip"'
    assert fetch(world, path, If_None_Match=small.headers["etag"], Accept_Encoding="gzip").status_code == 304
    assert fetch(world, path, If_None_Match=small.headers["etag"], Accept_Encoding="identity").status_code == 200
    assert "content-encoding" not in fetch(world, path, Accept_Encoding="br, gzip;q=0").headers


def test_parquet_is_compressed_already(world: Published) -> None:
    assert "content-encoding" not in fetch(world, "export?format=parquet", Accept_Encoding="gzip").headers


def test_results_are_sent_to_so_many_at_a_time(world: Published) -> None:
    downloads = world.app.state.shares.downloads
    assert fetch(world, "export?format=csv").status_code == 200
    with ExitStack() as held:
        for tenant in ("first", "second"):
            for _ in range(downloads.each):
                held.enter_context(holding(downloads, tenant))
        refused = fetch(world, "export?format=csv")
    assert (refused.status_code, refused.json()["code"]) == (503, "too_many_downloads")
    assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("5", "true")
    assert downloads.held == 0


def test_a_client_that_goes_away_leaves_no_connection(world: Published, url: str) -> None:
    with Winnow(url, world.key) as winnow:
        for _ in range(5):  # more than the pool has connections
            assert next(winnow.weights(world.job_id))["index"] == 0
        assert winnow.results(world.job_id)["sample_count"] == N
