"""`Idempotency-Key`: one effect and one answer, whatever is sent again, at once, after a crash or a day later."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from support.world import World

from service.db.locks import try_advisory_lock
from service.idempotency import repository
from service.ids import new_id
from service.jobs import submission

JOBS, DATASETS = "/v1/selection-jobs", "/v1/datasets"
ROWS = b'{"prompt": "a", "completion": "b"}\n' * 8


@pytest.fixture
def body(api: World, tmp_path: Any) -> dict[str, Any]:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 6}))
    return {
        "model": "small",
        "pool": upload(api.client).json()["id"],
        "target": upload(api.client).json()["id"],
        "budget": 2,
    }


def upload(client: TestClient, key: str | None = None, content: bytes = ROWS, **params: str) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    return client.post(DATASETS, params={"name": "pool", **params}, content=content, headers=headers)


def post(client: TestClient, key: str, body: dict[str, Any], path: str = JOBS) -> Any:
    return client.post(path, json=body, headers={"Idempotency-Key": key})


def count(api: World, table: str) -> int:
    with api.engine.connect() as connection:
        return connection.scalar(text(f"SELECT count(*) FROM {table}"))


def same(first: Any, again: Any) -> bool:
    names = ("location", "retry-after", "content-type")
    return (first.status_code, first.content, [first.headers.get(n) for n in names]) == (
        again.status_code,
        again.content,
        [again.headers.get(n) for n in names],
    )


def test_a_job_posted_again_is_the_same_job_with_the_same_answer(api: World, body: dict[str, Any]) -> None:
    first = post(api.client, "a-key", body)
    jobs = count(api, "selection_jobs")
    again = post(api.client, "a-key", body)
    assert first.status_code == 202
    assert same(first, again)
    assert (first.headers.get("idempotent-replayed"), again.headers["idempotent-replayed"]) == (None, "true")
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert count(api, "selection_jobs") == jobs
    assert post(api.client, "another-key", body).json()["id"] != first.json()["id"]


def test_an_upload_sent_again_is_the_same_dataset(api: World) -> None:
    first = upload(api.client, "upload")
    datasets = count(api, "datasets")
    again = upload(api.client, "upload")
    assert first.status_code == 201
    assert same(first, again)
    assert count(api, "datasets") == datasets
    form = {"file": ("pool.jsonl", ROWS)}
    as_form = api.client.post(DATASETS, params={"name": "pool"}, files=form, headers={"Idempotency-Key": "upload"})
    assert as_form.json()["id"] == first.json()["id"], "the boundary of a form is not part of the request"


def test_a_cancel_sent_again_gets_the_first_answer(api: World, body: dict[str, Any]) -> None:
    path = f"{JOBS}/{post(api.client, 'job', body).json()['id']}/cancel"
    first = post(api.client, "cancel", {}, path)
    assert first.json()["status"] == "cancelled"
    assert same(first, post(api.client, "cancel", {}, path))


def refused(response: Any, status: int, code: str, retry: str) -> None:
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert response.headers["x-should-retry"] == retry
    assert response.json()["param"] == "Idempotency-Key"


def test_a_changed_request_under_the_same_key_is_refused(api: World, body: dict[str, Any]) -> None:
    job = post(api.client, "k", body).json()
    assert upload(api.client, "u").status_code == 201
    jobs = count(api, "selection_jobs")
    for response in (
        post(api.client, "k", {**body, "budget": 3}),
        post(api.client, "k", body, f"{JOBS}/{job['id']}/cancel"),
        post(api.client, "k", {"nonsense": True}),
        upload(api.client, "k"),
        upload(api.client, "u", ROWS * 2),
        upload(api.client, "u", format="text"),
    ):
        refused(response, 422, "idempotency_key_reused", "false")
    assert count(api, "selection_jobs") == jobs
    assert api.client.get(f"{JOBS}/{job['id']}").json()["status"] == "queued"


def test_while_the_first_runs_the_second_is_told_to_come_back(api: World, body: dict[str, Any]) -> None:
    tenant = tenant_of(api, body)
    with api.sessions.begin() as session:
        assert try_advisory_lock(session, f"idempotency/{tenant}/busy")
        for response in (post(api.client, "busy", body), upload(api.client, "busy")):
            refused(response, 409, "idempotency_key_in_use", "true")
            assert int(response.headers["retry-after"]) > 0
    assert post(api.client, "busy", body).status_code == 202, "the lock went with its transaction"


def tenant_of(api: World, body: dict[str, Any]) -> str:
    with api.engine.connect() as connection:
        found = text("SELECT tenant_id FROM datasets WHERE id = :id")
        return str(connection.scalar(found, {"id": body["pool"]}))


def test_what_was_refused_is_not_kept(api: World, body: dict[str, Any]) -> None:
    for wrong, status in (({**body, "budget": 0}, 422), ({**body, "budget": 10**6}, 422), ({**body, "pool": "x"}, 422)):
        assert post(api.client, "k", wrong).status_code == status
    assert upload(api.client, "u", b"not json\n").status_code == 422
    assert post(api.client, "c", {}, f"{JOBS}/{new_id('job')}/cancel").status_code == 404
    assert post(api.client, "k", body).status_code == 202
    assert upload(api.client, "u").status_code == 201
    assert post(api.client, "c", body).status_code == 202


def test_a_request_that_breaks_off_has_no_effect_and_may_be_sent_again(
    api: World, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, datasets = count(api, "selection_jobs"), count(api, "datasets")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    was = "SELECT refused, EXISTS"
    fails = "SELECT (1 / ((SELECT count(*) FROM job) - 1))::text AS refused, EXISTS"  # when all was written
    assert was in submission._SUBMIT
    quiet = TestClient(api.client.app, headers=api.client.headers, raise_server_exceptions=False)
    with monkeypatch.context() as patch:
        patch.setattr(repository, "put", fail)
        patch.setattr(submission, "_SUBMIT", submission._SUBMIT.replace(was, fails))
        assert post(quiet, "k", body).status_code == 500
        assert upload(quiet, "u").status_code == 500
    assert (count(api, "selection_jobs"), count(api, "datasets")) == (jobs, datasets)
    assert post(api.client, "k", body).status_code == 202
    assert upload(api.client, "u").status_code == 201


def test_a_key_belongs_to_its_tenant(api: World, body: dict[str, Any]) -> None:
    assert upload(api.client, "shared").status_code == 201
    theirs = upload(api.other, "shared", ROWS * 2)
    assert theirs.status_code == 201, "another tenant's key is another key"


def test_after_a_day_the_key_is_new_again(api: World) -> None:
    first = upload(api.client, "old").json()["id"]
    with api.engine.begin() as connection:
        connection.execute(
            text("UPDATE idempotency_keys SET created_at = now() - interval '24 hours 1 second' WHERE key = 'old'")
        )
    second = upload(api.client, "old").json()["id"]
    assert second != first
    assert upload(api.client, "old").json()["id"] == second
    with api.engine.begin() as connection:
        connection.execute(text("UPDATE idempotency_keys SET created_at = now() - interval '2 days' WHERE key = 'old'"))
    with api.sessions.begin() as session:
        assert repository.delete_old(session) >= 1
    assert count(api, "idempotency_keys WHERE key = 'old'") == 0


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "é"])
def test_a_malformed_key_is_refused(api: World, key: str) -> None:
    response = api.client.post(
        DATASETS, params={"name": "p"}, content=ROWS, headers={"Idempotency-Key": key.encode("latin-1")}
    )
    assert response.status_code == 422
    assert response.json()["param"] == "Idempotency-Key"


def test_what_is_kept_cannot_be_read_in_the_database(api: World) -> None:
    found = upload(api.client, "sealed").json()
    with api.engine.connect() as connection:
        row = connection.execute(text("SELECT * FROM idempotency_keys WHERE key = 'sealed'")).one()
    assert found["fingerprint"].encode() not in bytes(row.sealed_body)


def test_every_post_takes_a_key(api: World) -> None:
    document = api.client.get("/openapi.json").json()
    without = [
        path
        for path, operations in document["paths"].items()
        if "post" in operations
        and not any(p["name"] == "Idempotency-Key" for p in operations["post"].get("parameters", []))
    ]
    assert without == []
