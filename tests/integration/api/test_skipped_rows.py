"""Uploads that leave out the rows that cannot be used: what is kept, what the report says, and whose it is."""

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi.testclient import TestClient
from support.damage import cut

from service.datasets import storage
from service.ids import new_id

if TYPE_CHECKING:
    from support.world import World

DATASETS = "/v1/datasets"


def post(client: TestClient, rows: bytes, **params: str) -> Any:
    return client.post(DATASETS, params={"name": "pool", **params}, content=rows)


def skipping(client: TestClient, rows: bytes) -> dict[str, Any]:
    answer = post(client, rows, on_bad_row="skip")
    assert answer.status_code == 201, answer.text
    return answer.json()


def report(client: TestClient, dataset: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.get(f"{DATASETS}/{dataset['id']}/skipped")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
    return [json.loads(line) for line in answer.content.splitlines()]


def places(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["unit"], row["number"]) for row in rows]


def test_the_others_are_kept_under_their_numbers_and_all_that_were_left_out_are_named(api: "World") -> None:
    lines = [b'{"text": "t"}' if i % 3 else b'{"text": %d}' % i for i in range(300)]
    dataset = skipping(api.client, b"\n\n".join(lines))
    assert (dataset["row_count"], dataset["skipped"]) == (200, 100)
    assert api.client.get(f"{DATASETS}/{dataset['id']}").json() == dataset
    assert [sample.id for sample in storage.iter_samples(api.store, dataset["fingerprint"])] == [
        str(i) for i in range(300) if i % 3
    ]
    found = report(api.client, dataset)
    assert places(found) == [("line", 2 * i + 1) for i in range(0, 300, 3)]
    assert all(row["reason"] for row in found)


def test_of_rows_with_one_id_the_first_is_kept(api: "World") -> None:
    rows = [{"id": "a", "text": "1"}, {"text": "2"}, {"text": 3}, {"id": "a", "text": "4"}, {"id": "1", "text": "5"}]
    dataset = skipping(api.client, "\n".join(map(json.dumps, rows)).encode())
    assert (dataset["row_count"], dataset["skipped"], dataset["sources"]) == (2, 3, {"(none)": 2})
    # The row without an id is the second of the file, so its id is 1.
    assert places(report(api.client, dataset)) == [("line", 3), ("line", 4), ("line", 5)]
    alone = post(api.client, b'{"id": "a", "text": "1"}\n{"id": "1", "text": "2"}').json()
    assert (dataset["fingerprint"], dataset["byte_count"]) == (alone["fingerprint"], alone["byte_count"])


def test_nothing_left_out_is_an_empty_report(api: "World") -> None:
    for dataset in (skipping(api.client, b'{"text": "t"}'), post(api.client, b'{"text": "t"}').json()):
        assert dataset["skipped"] == 0
        assert report(api.client, dataset) == []


def test_an_upload_of_which_nothing_is_left_is_refused(api: "World") -> None:
    for rows, named in ((b"{}\n" * 30, 20), (b"{}", 1)):
        found = post(api.client, rows, on_bad_row="skip")
        assert (found.status_code, found.json()["code"]) == (422, "invalid_rows")
        assert len(found.json()["errors"]) == named
        assert "on_bad_row" not in found.json()["detail"]
    assert api.client.get(DATASETS).json()["data"] == []


def test_without_a_word_nothing_is_skipped_and_the_error_says_how(api: "World") -> None:
    for params in ({}, {"on_bad_row": "refuse"}):
        found = post(api.client, b'{"text": "t"}\n{}', **params)
        assert (found.status_code, found.json()["param"]) == (422, "line 2")
        assert "on_bad_row=skip" in found.json()["detail"]


def test_a_report_is_its_datasets_own_and_goes_with_it(api: "World") -> None:
    """Although others have the same rows under the same fingerprint."""
    good = json.dumps({"id": "good", "text": new_id("t")}).encode()
    mine, theirs = skipping(api.client, good + b"\n{}"), skipping(api.other, b"{}\n" + good)
    third = post(api.client, good).json()
    assert mine["fingerprint"] == theirs["fingerprint"] == third["fingerprint"]
    assert places(report(api.client, mine)) == [("line", 2)]
    assert places(report(api.other, theirs)) == [("line", 1)]
    assert report(api.client, third) == []
    assert api.other.get(f"{DATASETS}/{mine['id']}/skipped").status_code == 404
    key = storage.skipped_key(mine["fingerprint"], mine["id"])
    assert api.store.exists(key)
    assert api.client.delete(f"{DATASETS}/{mine['id']}").status_code == 204
    assert not api.store.exists(key)
    assert api.client.get(f"{DATASETS}/{mine['id']}/skipped").status_code == 404
    assert places(report(api.other, theirs)) == [("line", 1)]
    assert api.client.get(f"{DATASETS}/{third['id']}/rows").is_success


def test_a_repeated_request_gets_the_same_answer_and_leaves_one_report(api: "World") -> None:
    rows = json.dumps({"id": "good", "text": new_id("t")}).encode() + b"\n{}"
    params, headers = {"name": "pool", "on_bad_row": "skip"}, {"Idempotency-Key": new_id("key")}
    first, second = (api.client.post(DATASETS, params=params, content=rows, headers=headers) for _ in range(2))
    assert first.content == second.content
    reports = [file for file in api.store.files("datasets") if storage.dataset_of(file.key)]
    assert [storage.dataset_of(file.key) for file in reports] == [first.json()["id"]]
    other = {**params, "on_bad_row": "refuse"}
    assert api.client.post(DATASETS, params=other, content=rows, headers=headers).status_code == 422


def test_a_report_counts_into_what_the_key_stores(api: "World") -> None:
    good = json.dumps({"id": "good", "text": new_id("t")}).encode()
    plain, more = post(api.client, good).json(), skipping(api.client, good + b"\n{}" * 10)
    (file,) = (file for file in api.store.files("datasets") if storage.dataset_of(file.key) == more["id"])
    used = api.client.get("/v1/usage").json()["stored_bytes"]["used"]
    assert used == plain["byte_count"] + more["byte_count"] + file.size


def test_a_damaged_report_is_refused(api: "World") -> None:
    good = json.dumps({"id": "good", "text": new_id("t")}).encode()
    dataset = skipping(api.client, gzip.compress(good + b"\n{}"))
    cut(Path(api.store.root, storage.skipped_key(dataset["fingerprint"], dataset["id"])))
    assert api.client.get(f"{DATASETS}/{dataset['id']}/skipped").status_code == 410
    assert api.client.get(f"{DATASETS}/{dataset['id']}/rows").is_success
