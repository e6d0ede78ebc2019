"""Results on a real PostgreSQL: what is published comes out of every route value by value."""

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from psycopg.errors import UniqueViolation
from sqlalchemy import text
from support.charts import small_charts
from support.jobs import add_job, publish_small, published, write_pool
from support.results import K, N, Published, same

from service.datasets import storage
from service.ledger.state import JobStatus
from service.results import repository
from service.results.tables import WeightChunk
from winnow.client import Winnow, WinnowError
from winnow.merkle import CHUNK_SIZE, merkle_root


def test_results_are_the_published_summary(world: Published) -> None:
    body = world.fetch("results").json()
    assert (body["object"], body["job_id"]) == ("selection_result", world.job_id)
    assert (body["sample_count"], body["selected_count"], body["method"]) == (N, K, "influence_distillation")
    assert sum(body["influence"]["histogram"]["counts"]) == np.isfinite(world.influence).sum() < N


def test_charts_are_those_that_were_published(world: Published) -> None:
    answer = world.fetch("results/charts")
    body = answer.json()
    assert (body.pop("object"), body.pop("job_id")) == ("result_charts", world.job_id)
    assert body.pop("created_at") == world.fetch("results").json()["created_at"]
    assert body == small_charts(N).model_dump(mode="json")
    headers = {"authorization": f"Bearer {world.key}", "if-none-match": answer.headers["etag"]}
    again = world.client.get(f"/v1/selection-jobs/{world.job_id}/results/charts", headers=headers)
    assert (again.status_code, again.content) == (304, b"")


def test_a_result_of_a_version_that_made_no_charts_says_so(world: Published, tmp_path: Path) -> None:
    content = write_pool(world.store, tmp_path / "pool", [("0", None, {"text": "a"}), ("1", None, {"text": "b"})])
    job_id = published(world.sessions, world.key, content, charts=None)
    answer = world.fetch("results/charts", job_id=job_id)
    assert (answer.status_code, answer.json()["code"]) == (404, "no_charts")
    assert world.fetch("results", job_id=job_id).status_code == 200


def test_the_view_holds_what_was_published(world: Published) -> None:
    with world.sessions() as session:
        rows = session.execute(
            text("SELECT influence, weight, exact FROM sample_weights WHERE job_id = :j ORDER BY sample_index"),
            {"j": world.job_id},
        ).all()
    influence, weight, exact = zip(*rows, strict=True)
    assert [value is None for value in influence] == np.isnan(world.influence).tolist()
    np.testing.assert_array_equal(np.array(influence, np.float32), world.influence)
    np.testing.assert_array_equal(np.array(weight, np.float32), world.weight)
    np.testing.assert_array_equal(np.array(exact), world.exact)


@pytest.mark.parametrize("start", [0, CHUNK_SIZE - 3, CHUNK_SIZE, N - 5])
def test_a_page_of_weights_also_across_chunks(world: Published, start: int) -> None:
    page = world.fetch("weights", limit=7, **({"after": start - 1} if start else {})).json()
    stop = min(start + 7, N)
    assert [row["index"] for row in page["data"]] == list(range(start, stop))
    assert all(same(row, world.row(row["index"])) for row in page["data"])
    assert (page["has_more"], page["last_id"]) == (stop < N, stop - 1)


def test_pages_of_weights_join_up(world: Published) -> None:
    page = world.fetch("weights", limit=10_000).json()
    seen = page["data"]
    while page["has_more"]:
        page = world.fetch("weights", after=page["last_id"], limit=10_000).json()
        seen += page["data"]
    np.testing.assert_array_equal(np.array([row["influence"] for row in seen], np.float32), world.influence)


def test_beyond_the_last_sample_there_is_nothing(world: Published) -> None:
    page = world.fetch("weights", after=N - 1).json()
    assert page == {"object": "list", "data": [], "has_more": False, "last_id": None}
    answer = world.fetch("weights", after=N - 1, stream=True)
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_page_of_weights_touches_only_its_chunks(world: Published) -> None:
    statement = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {repository._SENT_WEIGHTS.text}")
    where = {"job_id": world.job_id, "start": CHUNK_SIZE + 5, "stop": CHUNK_SIZE + 15, "first": 1, "last": 1}
    with world.sessions() as session:
        session.execute(text("SET LOCAL enable_seqscan = off"))  # three rows of a test are otherwise read whole
        plan = json.dumps(session.execute(statement, where).scalar_one())
    node = json.loads(plan)[0]["Plan"]
    while "Plans" in node:
        node = node["Plans"][0]
    assert node["Index Name"] == "pk_weight_chunks"
    assert node["Index Cond"].count("chunk_no") == 2
    assert node["Actual Rows"] == 1
    assert "Rows Removed by Filter" not in plan


def test_the_stream_of_weights(world: Published) -> None:
    answer = world.fetch("weights", stream=True)
    assert answer.headers["content-type"] == "application/x-ndjson"
    rows = [json.loads(line) for line in answer.text.splitlines()]
    assert len(rows) == N
    assert all(same(row, world.row(i)) for i, row in enumerate(rows))


def test_a_stream_continues_where_another_broke_off(world: Published) -> None:
    rows = [json.loads(line) for line in world.fetch("weights", stream=True, after=N - 20_001).text.splitlines()]
    assert [row["index"] for row in rows] == list(range(N - 20_000, N))


def test_selected_pages_are_in_rank_order(world: Published) -> None:
    page = world.fetch("selected", limit=180).json()
    rows = page["data"]
    while page["has_more"]:
        page = world.fetch("selected", after=page["last_id"], limit=180).json()
        rows += page["data"]
    assert [row.pop("rank") for row in rows] == list(range(K))
    assert all(same(row, world.row(i)) for row, i in zip(rows, world.selected.tolist(), strict=True))


def read_export(answer: Any, format: str) -> list[dict[str, Any]]:
    if format == "jsonl":
        return [json.loads(line) for line in answer.text.splitlines()]
    if format == "parquet":
        return list(pq.read_table(io.BytesIO(answer.content)).to_pylist())
    rows = []
    for row in csv.DictReader(io.StringIO(answer.content.decode(), newline="")):
        typed: dict[str, Any] = {"index": int(row["index"]), "id": row["id"], "source": row["source"] or None}
        typed |= {name: float(row[name]) if row[name] else None for name in ("influence", "weight")}
        typed |= {name: {"true": True, "false": False}[row[name]] for name in ("exact", "selected")}
        rows.append(typed | {"rank": int(row["rank"]) if row["rank"] else None})
    return rows


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("selected_only", [False, True])
def test_an_export_holds_what_was_published(world: Published, format: str, selected_only: bool) -> None:
    answer = world.fetch("export", format=format, selected_only=selected_only)
    assert answer.headers["content-disposition"] == f'attachment; filename="{world.job_id}.{format}"'
    rows, ranks = read_export(answer, format), world.ranks()
    indices = world.selected.tolist() if selected_only else range(N)
    assert len(rows) == len(indices)
    for row, i in zip(rows, indices, strict=True):
        assert same(row, world.row(i) | {"selected": i in ranks, "rank": ranks.get(i)})


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("selected_only", [False, True])
def test_an_export_carries_the_messages(world: Published, format: str, selected_only: bool) -> None:
    rows = read_export(world.fetch("export", format=format, selected_only=selected_only, include="messages"), format)
    indices = world.selected.tolist() if selected_only else range(N)
    assert [row["id"] for row in rows] == [world.ids[i] for i in indices]
    for row, i in zip(rows, indices, strict=True):
        assert row["messages"] == [
            {"role": "user", "content": f"ask {i}"},
            {"role": "assistant", "content": "é" * 9},
        ]


def test_the_datasets_library_loads_the_parquet(world: Published, tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "selection.parquet"
    path.write_bytes(world.fetch("export", selected_only=True, include="messages").content)
    loaded = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"), keep_in_memory=True
    )
    assert loaded["rank"][:] == list(range(K))
    assert loaded[0]["messages"][0] == {"role": "user", "content": f"ask {world.selected[0]}"}


def test_a_pool_that_mixes_text_and_messages_has_both_columns(world: Published, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    content = write_pool(world.store, tmp_path / "pool", [("0", None, chat), ("1", None, {"text": "c"})])
    job_id = published(world.sessions, world.key, content)
    rows = read_export(world.fetch("export", job_id=job_id, include="messages"), "parquet")
    assert [(row["messages"], row["text"]) for row in rows] == [(chat["messages"], None), (None, "c")]


def test_a_deleted_pool_keeps_its_results_but_not_its_text(world: Published, tmp_path: Path) -> None:
    content = write_pool(world.store, tmp_path / "pool", [("a", "s", {"text": "x"}), ("b", "s", {"text": "y"})])
    job_id = published(world.sessions, world.key, content, deleted=True)
    world.store.delete(storage.rows_key(content.fingerprint))
    gone = world.fetch("export", job_id=job_id, include="messages")
    assert (gone.status_code, gone.json()["code"], gone.json()["param"]) == (410, "pool_deleted", "include")
    url, key = f"/v1/selection-jobs/{job_id}/export?include=messages", f"Bearer {world.key}"
    assert world.client.get(url, headers={"Authorization": key, "If-None-Match": "*"}).status_code == 410
    assert [row["id"] for row in read_export(world.fetch("export", job_id=job_id), "parquet")] == ["a", "b"]
    sample = world.fetch("samples/1", job_id=job_id).json()
    assert (sample["id"], sample["influence"], sample["rank"]) == ("b", 1.0, 0)
    assert sample["text"] is sample["messages"] is None
    assert sample["content_missing"].endswith("has been deleted, including its text.")


@pytest.mark.parametrize("index", [0, CHUNK_SIZE - 1, CHUNK_SIZE, N - 1])
def test_a_sample_is_what_was_published_of_it(world: Published, index: int) -> None:
    body = world.fetch(f"samples/{index}").json()
    assert same({name: body[name] for name in world.row(index)}, world.row(index))
    assert (body["object"], body["job_id"], body["text"]) == ("sample", world.job_id, None)
    assert body["messages"][0]["content"] == f"ask {index}"
    assert (body["selected"], body["rank"]) == (index in world.ranks(), world.ranks().get(index))
    # The job was published by hand: no stage has left anything.
    assert body["explanation"] is None
    assert "Post the same job again" in body["explanation_missing"]


def test_a_sample_is_found_by_its_id(world: Published) -> None:
    for index in (0, CHUNK_SIZE, N - 1):
        assert world.fetch("samples", id=world.ids[index]).json() == world.fetch(f"samples/{index}").json()
    absent = world.fetch("samples", id="no such")
    assert (absent.status_code, absent.json()["param"]) == (404, "id")


def test_a_selected_sample_has_its_rank(world: Published) -> None:
    for rank in (0, K - 1):
        body = world.fetch(f"samples/{world.selected[rank]}").json()
        assert (body["selected"], body["rank"]) == (True, rank)


@pytest.mark.parametrize(
    ("index", "params", "status", "param"),
    [
        (N, {}, 404, "index"),
        (-1, {}, 404, "index"),
        (2**70, {}, 404, "index"),
        ("x", {}, 422, "index"),
        (0, {"target": N}, 422, "target"),
        (0, {"target": -1}, 422, "target"),
        (0, {"landmarks": 101}, 422, "landmarks"),
        (0, {"targets_limit": 0}, 422, "targets_limit"),
    ],
)
def test_a_sample_that_cannot_be_is_refused(
    world: Published, index: int | str, params: dict[str, int], status: int, param: str
) -> None:
    answer = world.fetch(f"samples/{index}", **params)
    assert (answer.status_code, answer.json()["param"]) == (status, param)


def test_provenance_verifies_a_download(world: Published) -> None:
    body = world.fetch("provenance").json()
    assert body["record"].keys() == {"seed", "selection_sha256"}
    table = pq.read_table(io.BytesIO(world.fetch("export").content))
    arrays = [
        table[name].to_numpy().astype(kind) for name, kind in (("influence", "<f4"), ("weight", "<f4"), ("exact", "u1"))
    ]
    leaves = [
        hashlib.sha256(b"".join(array[start : start + CHUNK_SIZE].tobytes() for array in arrays)).digest()
        for start in range(0, N, CHUNK_SIZE)
    ]
    assert merkle_root(leaves).hex() == body["weights_root"]
    assert world.fetch("provenance", chunks=True).json()["chunk_sha256"] == [leaf.hex() for leaf in leaves]


@pytest.mark.parametrize(
    ("status", "code", "retry_after"),
    [
        (JobStatus.QUEUED, "job_not_finished", "5"),
        (JobStatus.RUNNING, "job_not_finished", "5"),
        (JobStatus.CANCELLING, "job_not_finished", None),
        (JobStatus.FAILED, "no_results", None),
        (JobStatus.CANCELLED, "no_results", None),
    ],
)
def test_a_job_that_has_not_succeeded_has_no_results(
    world: Published, tmp_path: Path, status: JobStatus, code: str, retry_after: str | None
) -> None:
    content = write_pool(world.store, tmp_path / "pool", [("a", None, {"text": "x"})])
    job_id = add_job(world.sessions, world.key, content, status)
    for path in ("results", "weights", "selected", "samples/0", "export", "provenance"):
        answer = world.fetch(path, job_id=job_id)
        assert (answer.status_code, answer.json()["code"]) == (409, code)
        assert answer.headers.get("retry-after") == retry_after
        if code == "no_results":
            assert status in answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "params", "param"),
    [
        ("export", {"format": "xlsx"}, "format"),
        ("weights", {"stream": True, "limit": 5}, "limit"),
        ("weights", {"limit": 10_001}, "limit"),
        ("weights", {"after": -1}, "after"),
        ("selected", {"limit": 0}, "limit"),
    ],
)
def test_a_wrong_parameter_is_named(world: Published, path: str, params: dict[str, Any], param: str) -> None:
    answer = world.fetch(path, **params)
    assert (answer.status_code, answer.json()["param"]) == (422, param)


def test_the_client_reads_all_of_it_from_a_real_server(world: Published, url: str, tmp_path: Path) -> None:
    with Winnow(url, world.key) as winnow:
        assert winnow.results(world.job_id)["selected_count"] == K
        assert [row["index"] for row in winnow.selected(world.job_id)] == world.selected.tolist()
        assert all(same(row, world.row(i)) for i, row in enumerate(winnow.weights(world.job_id)))
        path = winnow.export(world.job_id, tmp_path / "all.parquet", selected_only=False, include=None)
        np.testing.assert_array_equal(pq.read_table(path)["weight"].to_numpy(), world.weight)
        results = winnow.results(world.job_id)
        frame = results.to_pandas(include=None)
        assert frame["index"].tolist() == [row.index for row in results.selected()] == world.selected.tolist()
        assert len(results.to_dataset(selected_only=False, include=None)) == results.sample_count == len(world.weight)
        assert results.provenance().job_id == winnow.job(world.job_id).results().job_id == world.job_id
        dataset = winnow.upload_dataset(b'{"text": "a"}\n', name="small")
        assert next(winnow.datasets()).id == dataset.id
        winnow.delete_dataset(dataset.id)
        with pytest.raises(WinnowError, match="not_found"):
            winnow.results("job_0")


def test_publish_is_part_of_the_callers_transaction(world: Published, tmp_path: Path) -> None:
    content = write_pool(world.store, tmp_path / "pool", [("a", None, {"text": "x"}), ("b", None, {"text": "y"})])
    job_id = add_job(world.sessions, world.key, content, JobStatus.SUCCEEDED)
    with world.sessions() as session:
        publish_small(session, job_id, 2)
        session.rollback()
    with world.sessions.begin() as session:
        assert session.get(WeightChunk, (job_id, 0)) is None
        publish_small(session, job_id, 2)
    with pytest.raises(UniqueViolation), world.sessions.begin() as session:
        publish_small(session, job_id, 2)
