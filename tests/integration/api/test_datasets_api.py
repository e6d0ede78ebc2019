"""Datasets over HTTP on a real PostgreSQL: upload, pages, tenants kept apart, deletion and what it leaves."""

import gzip
import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update
from support.damage import cut, flip_second_half

from service.auth.tables import ApiKey
from service.datasets import router, service, storage
from service.datasets.convert import convert
from service.datasets.tables import Dataset
from service.db.engine import Sessions
from service.http.errors import Unprocessable
from service.ids import new_id
from service.ledger.state import JobStatus
from service.ledger.tables import SelectionJob
from service.settings import ApiSettings, UploadSettings
from service.storage.tempdirs import find_abandoned

if TYPE_CHECKING:
    from support.world import World

ROWS = b'{"id": "a", "source": "s", "prompt": "p", "completion": "c"}\n{"text": "t"}\n'


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    return settings.model_copy(
        update={"uploads": UploadSettings(max_bytes=100_000, max_rows=1000, max_row_bytes=50_000)}
    )


def upload(client: TestClient, data: Any = ROWS, **params: str) -> dict[str, Any]:
    response = client.post("/v1/datasets", params={"name": "pool", **params}, content=data)
    assert response.status_code == 201, response.text
    return response.json()


def unique_rows() -> bytes:
    """Content that no other test leaves behind."""
    return ROWS + json.dumps({"id": "unique", "text": new_id("t")}).encode()


def problem(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == code
    return response.json()


def add_job(sessions: Sessions, dataset_id: str) -> str:
    job_id = new_id("job")
    with sessions.begin() as session:
        tenant_id = session.scalars(select(Dataset.tenant_id).where(Dataset.id == dataset_id)).one()
        key_id = session.scalars(select(ApiKey.id).where(ApiKey.tenant_id == tenant_id)).one()
        session.add(
            SelectionJob(
                id=job_id,
                tenant_id=tenant_id,
                key_id=key_id,
                status=JobStatus.QUEUED,
                pool_id=dataset_id,
                target_id=dataset_id,
                model={},
                budget=1,
                parameters={},
                request={},
                job_metadata={},
            )
        )
    return job_id


def test_an_upload_becomes_a_dataset(api: "World") -> None:
    response = api.client.post("/v1/datasets", params={"name": "pool"}, content=ROWS)
    assert response.status_code == 201
    dataset = response.json()
    assert response.headers["location"] == f"/v1/datasets/{dataset['id']}"
    assert dataset | {"id": "", "created_at": "", "fingerprint": "", "byte_count": 0} == {
        "object": "dataset",
        "status": "ready",
        "hub": None,
        "progress": None,
        "error": None,
        "id": "",
        "name": "pool",
        "fingerprint": "",
        "row_count": 2,
        "byte_count": 0,
        "sources": {"s": 1, "(none)": 1},
        "detected": {
            "container": "jsonl",
            "compression": None,
            "forms": [
                {
                    "form": "prompt_completion",
                    "columns": {"prompt": "prompt", "completion": "completion", "id": "id", "source": "source"},
                    "rows": 1,
                },
                {"form": "text", "columns": {"text": "text"}, "rows": 1},
            ],
            "more_forms": 0,
            "source_columns": ["source"],
            "left_alone": [],
            "more_left_alone": 0,
            "notes": [],
            "sha256": hashlib.sha256(ROWS).hexdigest(),
        },
        "skipped": 0,
        "created_at": "",
    }
    assert api.client.get(response.headers["location"]).json() == dataset
    assert [s.id for s in storage.iter_samples(api.store, dataset["fingerprint"])] == ["a", "1"]


def test_the_same_rows_may_come_raw_gzipped_in_chunks_or_as_a_form(api: "World") -> None:
    def chunks() -> Iterator[bytes]:
        for i in range(0, len(ROWS), 7):
            yield ROWS[i : i + 7]

    datasets = [upload(api.client), upload(api.client, gzip.compress(ROWS)), upload(api.client, chunks())]
    form = api.client.post("/v1/datasets", params={"name": "form"}, files={"file": ("pool.jsonl", ROWS)})
    datasets.append(form.json())
    table = io.BytesIO()
    rows, names = [json.loads(line) for line in ROWS.splitlines()], ("id", "source", "prompt", "completion", "text")
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), table)
    datasets.append(api.client.post("/v1/datasets", params={"name": "form"}, files={"file": table.getvalue()}).json())
    assert len({dataset["fingerprint"] for dataset in datasets}) == 1
    assert len({dataset["id"] for dataset in datasets}) == 5


def test_a_form_without_the_file_is_refused(api: "World") -> None:
    for files in ({"data": ("pool.jsonl", ROWS)}, {"file": ("a", ROWS), "more": ("b", ROWS)}, {"file": (None, "text")}):
        response = api.client.post("/v1/datasets", params={"name": "form"}, files=files)
        assert problem(response, 400, "bad_request")["param"] == "file"


def test_bad_rows_are_named_and_nothing_is_kept(api: "World") -> None:
    response = api.client.post("/v1/datasets", params={"name": "pool"}, content=ROWS + b'\n{"text": "\\ud800"}\n')
    found = problem(response, 422, "invalid_rows")
    assert found["param"] == "line 4"
    assert [error["param"] for error in found["errors"]] == ["line 4"]
    assert api.client.get("/v1/datasets").json()["data"] == []
    assert not api.store.fs.exists(api.store.root)


def test_the_form_and_the_columns_can_be_named(api: "World") -> None:
    both = b'{"text": "t", "prompt": "p", "reply": "c"}'
    dataset = upload(api.client, both, columns="completion:reply")
    row = api.client.get(f"/v1/datasets/{dataset['id']}/rows").json()["data"][0]
    assert [message["content"] for message in row["messages"]] == ["p", "c"]
    dataset = upload(api.client, both, template='{"user": "{{ prompt }}", "assistant": "{{ reply | upper }}"}')
    row = api.client.get(f"/v1/datasets/{dataset['id']}/rows").json()["data"][0]
    assert [message["content"] for message in row["messages"]] == ["p", "C"]
    found = api.client.post("/v1/datasets", params={"name": "n", "columns": "reply:completion"}, content=both)
    assert problem(found, 422, "invalid_request")["param"] == "columns"
    dataset = upload(api.client, both, format="text")
    row = api.client.get(f"/v1/datasets/{dataset['id']}/rows").json()["data"][0]
    assert row == dict.fromkeys(row) | {"index": 0, "id": "0", "text": "t"}
    problem(
        api.client.post("/v1/datasets", params={"name": "n", "format": "csv"}, content=both), 422, "invalid_request"
    )


@pytest.mark.parametrize("name", [None, "", "a" * 257, "a\0b", "a\nb"])
def test_a_name_is_asked_for(api: "World", name: str | None) -> None:
    response = api.client.post("/v1/datasets", params={"name": name} if name is not None else {}, content=ROWS)
    assert problem(response, 422, "invalid_request")["param"] == "name"


def test_a_body_beyond_the_budget_is_refused_announced_or_not(api: "World") -> None:
    large = b" " * 100_001
    for request in ({"content": large}, {"content": iter([large])}, {"files": {"file": ("pool.jsonl", large)}}):
        problem(api.client.post("/v1/datasets", params={"name": "pool"}, **request), 413, "upload_too_large")
    packed = gzip.compress(b'{"text": "t"}\n' * 10_000)
    problem(api.client.post("/v1/datasets", params={"name": "pool"}, content=packed), 413, "upload_too_large")


def test_no_key_no_upload(api: "World") -> None:
    response = api.client.post(
        "/v1/datasets", params={"name": "pool"}, content=ROWS, headers={"Authorization": "Bearer wnw_x_y"}
    )
    problem(response, 401, "unauthorized")


def test_an_upload_holds_no_database_connection_while_it_is_received(api: "World") -> None:
    """A few slow uploads would otherwise take every connection there is, and with them the API, for hours."""
    in_use = []

    def chunks() -> Iterator[bytes]:
        for chunk in (ROWS[:10], ROWS[10:]):
            in_use.append(api.engine.pool.checkedout())
            yield chunk

    upload(api.client, chunks())
    assert in_use == [0, 0]


def test_lists_are_newest_first_and_paged(api: "World") -> None:
    ids = [upload(api.client, name=f"n{i}")["id"] for i in range(5)][::-1]
    first = api.client.get("/v1/datasets", params={"limit": 2}).json()
    assert (first["object"], first["has_more"], first["last_id"]) == ("list", True, ids[1])
    second = api.client.get("/v1/datasets", params={"limit": 3, "after": first["last_id"]}).json()
    assert (second["has_more"], second["last_id"]) == (False, ids[4])
    assert [dataset["id"] for dataset in first["data"] + second["data"]] == ids
    for after in ("ds_x", "\0"):
        assert (
            problem(api.client.get("/v1/datasets", params={"after": after}), 422, "invalid_request")["param"] == "after"
        )


def test_rows_are_paged_in_order(api: "World") -> None:
    dataset = upload(api.client, b"".join(json.dumps({"text": f"t{i}"}).encode() + b"\n" for i in range(50)))
    url = f"/v1/datasets/{dataset['id']}/rows"
    page = api.client.get(url, params={"after": 9, "limit": 30}).json()
    assert [(row["index"], row["text"]) for row in page["data"]] == [(i, f"t{i}") for i in range(10, 40)]
    assert (page["has_more"], page["last_id"]) == (True, 39)
    last = api.client.get(url, params={"after": 39}).json()
    assert (len(last["data"]), last["has_more"], last["last_id"]) == (10, False, 49)
    assert api.client.get(url, params={"after": 10**15}).json()["data"] == []
    problem(api.client.get(url, params={"limit": 101}), 422, "invalid_request")


def test_another_tenants_dataset_is_as_one_that_never_was(api: "World") -> None:
    dataset_id = upload(api.client)["id"]
    for url in (dataset_id, "ds_" + "0" * 32, "nonsense", "%00"):
        problem(api.other.get(f"/v1/datasets/{url}"), 404, "dataset_not_found")
        problem(api.other.get(f"/v1/datasets/{url}/rows"), 404, "dataset_not_found")
        problem(api.other.delete(f"/v1/datasets/{url}"), 404, "dataset_not_found")
    assert api.other.get("/v1/datasets").json()["data"] == []
    assert api.client.get(f"/v1/datasets/{dataset_id}").status_code == 200


def test_deletion_removes_rows_once_no_dataset_has_them(api: "World") -> None:
    rows = unique_rows()
    mine, theirs = upload(api.client, rows), upload(api.other, rows)
    fingerprint = mine["fingerprint"]
    assert fingerprint == theirs["fingerprint"]
    assert api.client.delete(f"/v1/datasets/{mine['id']}").status_code == 204
    problem(api.client.delete(f"/v1/datasets/{mine['id']}"), 404, "dataset_not_found")
    assert len(api.other.get(f"/v1/datasets/{theirs['id']}/rows").json()["data"]) == 3
    assert api.other.delete(f"/v1/datasets/{theirs['id']}").status_code == 204
    assert not api.store.exists(storage.rows_key(fingerprint))
    assert not api.store.exists(storage.ids_key(fingerprint))
    again = upload(api.client, rows)
    assert len(api.client.get(f"/v1/datasets/{again['id']}/rows").json()["data"]) == 3


@pytest.mark.parametrize("damage", [cut, flip_second_half])
@pytest.mark.parametrize("file", [storage.rows_key, storage.ids_key], ids=["rows", "ids"])
def test_the_same_content_repairs_what_was_damaged_whoever_uploads_it(
    api: "World", damage: Callable[[Path], None], file: Callable[[str], str]
) -> None:
    rows = unique_rows()
    mine = upload(api.client, rows)
    url = f"/v1/datasets/{mine['id']}/rows"
    before = api.client.get(url).json()
    aside = len(api.store.set_aside())
    damage(Path(api.store.root, file(mine["fingerprint"])))
    theirs = upload(api.other, rows)
    assert len(api.store.set_aside()) == aside + 1
    assert api.client.get(url).json() == before
    assert api.other.get(f"/v1/datasets/{theirs['id']}/rows").json() == before
    assert storage.read_ids(api.store, mine["fingerprint"], 0, 9)[0] == ["a", "1", "unique"]


def test_damaged_rows_are_refused_with_what_to_do(api: "World") -> None:
    rows = unique_rows()
    url = f"/v1/datasets/{upload(api.client, rows)['id']}/rows"
    damaged = api.app.state.metrics.storage.damaged
    before, found = damaged._value.get(), api.client.get(url).json()
    cut(max(Path(api.store.root).rglob("rows.parquet"), key=lambda path: path.stat().st_mtime_ns))
    for code in ("files_damaged", "files_missing"):  # the first reader sets them aside
        answer = api.client.get(url)
        assert "pload" in problem(answer, 410, code)["detail"]
        assert answer.headers["x-should-retry"] == "false"
    assert damaged._value.get() == before + 1
    upload(api.client, rows)
    assert api.client.get(url).json() == found


def test_a_dataset_stays_while_a_job_needs_it_and_its_ids_after(api: "World") -> None:
    dataset = upload(api.client, unique_rows())
    job_id = add_job(api.sessions, dataset["id"])
    response = api.client.delete(f"/v1/datasets/{dataset['id']}")
    assert job_id in problem(response, 409, "dataset_in_use")["detail"]
    with api.sessions.begin() as session:
        cancelled = {"status": JobStatus.CANCELLED, "finished_at": datetime.now(UTC)}
        session.execute(update(SelectionJob).where(SelectionJob.id == job_id).values(**cancelled))
    assert api.client.delete(f"/v1/datasets/{dataset['id']}").status_code == 204
    assert not api.store.exists(storage.rows_key(dataset["fingerprint"]))
    assert storage.read_ids(api.store, dataset["fingerprint"], 0, 9) == (["a", "1", "unique"], ["s", None, None])


def test_a_job_requires_a_live_dataset_of_its_tenant_and_keeps_it(api: "World") -> None:
    dataset_id = upload(api.client)["id"]
    with api.sessions.begin() as session:
        tenant_id = session.scalars(select(Dataset.tenant_id).where(Dataset.id == dataset_id)).one()
        for tenant, dataset in (("tnt_other", dataset_id), (tenant_id, "nonsense")):
            with pytest.raises(Unprocessable) as error:
                service.require(session, tenant, dataset, "pool")
            assert (error.value.param, error.value.problem_code) == ("pool", "dataset_not_found")
        assert service.require(session, tenant_id, dataset_id, "pool").id == dataset_id
        deletion = threading.Thread(target=api.client.delete, args=(f"/v1/datasets/{dataset_id}",))
        deletion.start()
        deletion.join(timeout=0.5)
        assert deletion.is_alive(), "a job is being created on the dataset: deletion must wait"
    deletion.join()
    assert api.client.get(f"/v1/datasets/{dataset_id}").status_code == 404


def test_what_an_upload_is_converted_in_says_whose_it_is_and_goes_with_it(
    api: "World", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it goes too where the process is killed meanwhile: see `service.storage.tempdirs`."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    seen: list[Path] = []
    abandoned: list[Path] = []

    def converting(*given: Any, **more: Any) -> storage.Content:
        seen.extend(folder.iterdir())
        abandoned.extend(find_abandoned(folder))
        assert more["folder"].parent == folder
        return convert(*given, **more)

    monkeypatch.setattr(router, "convert", converting)
    upload(api.client, unique_rows())
    assert api.client.post("/v1/datasets?name=x", content=b"{}").status_code == 422
    assert len(seen) == 2
    assert abandoned == []
    assert list(folder.iterdir()) == []
