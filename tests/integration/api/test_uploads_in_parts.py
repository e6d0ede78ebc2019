"""Uploads in parts: what has come stays, whatever breaks; nothing is counted or kept twice, and nobody else can reach it."""

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from support.raw_http import connected
from support.waiting import at_once, until
from support.world import DATASETS, World, serving
from test_limits import limited

from service.datasets import router
from service.datasets.uploads import files, repository
from service.settings import ApiSettings

UPLOADS = "/v1/uploads"
PART = 1_000
CONTENT = b"".join(b'{"id": "%d", "prompt": "p", "completion": "%s"}\n' % (i, b"c" * 50) for i in range(60))
PARTS = [CONTENT[start : start + PART] for start in range(0, len(CONTENT), PART)]


@pytest.fixture
def settings(settings: ApiSettings) -> ApiSettings:
    return settings.model_copy(update={"uploads": settings.uploads.model_copy(update={"part_bytes": PART})})


def begun(client: TestClient, content: bytes = CONTENT, status: int = 201) -> Any:
    answer = client.post(UPLOADS, json={"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    assert answer.status_code == status, answer.text
    return answer.json()


def put(client: Any, upload: str, number: int, content: bytes | None = None) -> Any:
    return client.put(f"{UPLOADS}/{upload}/parts/{number}", content=PARTS[number] if content is None else content)


def sent(client: Any, parts: list[bytes] = PARTS) -> str:
    upload = begun(client, b"".join(parts))["id"]
    for number, part in enumerate(parts):
        assert put(client, upload, number, part).json()["received"] == number + 1
    return str(upload)


def finish(client: Any, upload: str, key: str | None = None, **params: str) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    return client.post(DATASETS, params={"name": "d", "upload": upload, **params}, headers=headers)


def refused(answer: Any, status: int, code: str, param: str | None = None) -> Any:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json().get("param") == param
    return answer


def stored(api: World) -> set[str]:
    """The parts in the store, of whichever upload."""
    return {file.key for file in api.store.files() if files.upload_of(file.key)}


def used(client: TestClient, what: str = "stored_bytes") -> int:
    return int(client.get("/v1/usage").json()[what]["used"])


def test_the_parts_make_the_dataset_that_the_file_makes_and_go(api: World) -> None:
    direct = api.client.post(DATASETS, params={"name": "d"}, content=CONTENT).json()
    before = used(api.client)
    upload = begun(api.client)
    assert (upload["parts"], upload["part_bytes"], upload["received"]) == (len(PARTS), PART, 0)
    assert (used(api.client), used(api.client, "open_uploads")) == (before + len(CONTENT), 1)
    dataset = finish(api.client, sent_rest(api.client, upload))
    assert dataset.status_code == 201
    same = ("fingerprint", "row_count", "byte_count", "sources", "detected", "skipped")
    assert [dataset.json()[name] for name in same] == [direct[name] for name in same]
    assert used(api.client) == before + direct["byte_count"], "the upload counts no longer"
    assert used(api.client, "open_uploads") == 0
    assert stored(api) == set()
    refused(api.client.get(f"{UPLOADS}/{upload['id']}"), 404, "upload_not_found")
    refused(finish(api.client, upload["id"]), 404, "upload_not_found")


def sent_rest(client: TestClient, upload: dict[str, Any]) -> str:
    for number in range(upload["received"], upload["parts"]):
        assert put(client, upload["id"], number).status_code == 200
    return str(upload["id"])


def test_the_same_file_again_goes_on_where_it_was(api: World) -> None:
    upload = begun(api.client)
    assert [put(api.client, upload["id"], number).status_code for number in (0, 1)] == [200, 200]
    again = begun(api.client, status=200)
    assert (again["id"], again["received"]) == (upload["id"], 2)
    assert begun(api.client, CONTENT[:-1])["id"] != upload["id"]
    tenants_other_key = limited(api, tenant_of(api))
    assert begun(tenants_other_key)["id"] != upload["id"], "each key's uploads are its own"
    assert begun(api.other)["id"] != upload["id"]
    listed = [entry["id"] for entry in api.client.get(UPLOADS).json()["data"]]
    assert upload["id"] in listed
    assert len(listed) == 3
    assert finish(api.client, sent_rest(api.client, again)).status_code == 201


def tenant_of(api: World) -> str:
    with api.engine.connect() as connection:
        query = "SELECT t.name FROM tenants t JOIN api_keys k ON k.tenant_id = t.id WHERE k.prefix = :prefix"
        return str(connection.scalar(text(query), {"prefix": api.key.split("_")[1]}))


def test_parts_come_in_order_and_whole(api: World) -> None:
    upload = begun(api.client)["id"]
    refused(finish(api.client, upload), 409, "upload_incomplete", "upload")
    refused(put(api.client, upload, 1), 409, "part_not_next", "number")
    for content, status in ((PARTS[0][:-1], 400), (b"", 400), (PARTS[0] + b"x", 413)):
        assert put(api.client, upload, 0, content).status_code == status
    assert put(api.client, upload, 0).status_code == 200
    refused(put(api.client, upload, 0), 409, "part_not_next", "number")
    sent_rest(api.client, api.client.get(f"{UPLOADS}/{upload}").json())
    refused(put(api.client, upload, len(PARTS), b"x"), 409, "part_not_next", "number")
    answer = api.client.post(DATASETS, params={"name": "d", "upload": upload}, content=CONTENT)
    refused(answer, 400, "bad_request", "upload")
    assert finish(api.client, upload).status_code == 201


def test_what_is_not_the_announced_file_is_refused_and_forgotten(api: World) -> None:
    upload = begun(api.client)["id"]
    for number, part in enumerate(PARTS):
        assert put(api.client, upload, number, part.replace(b"c", b"d")).status_code == 200
    refused(finish(api.client, upload), 422, "upload_damaged", "upload")
    assert stored(api) == set()
    assert begun(api.client)["received"] == 0, "a new one"


@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_a_part_that_the_store_has_lost_ends_the_upload(api: World, damage: str) -> None:
    upload = sent(api.client)
    path = Path(api.store.root, files.part_key(upload, 1))
    path.unlink() if damage == "removed" else path.write_bytes(b"x" * PART)
    refused(finish(api.client, upload), 422, "upload_damaged", "upload")
    assert stored(api) == set()
    assert finish(api.client, sent(api.client)).status_code == 201


def test_after_a_refusal_the_upload_is_there_for_another_attempt(api: World) -> None:
    rows = CONTENT + b'{"nothing": "known"}\n'
    upload = sent(api.client, [rows[start : start + PART] for start in range(0, len(rows), PART)])
    refused(finish(api.client, upload), 422, "invalid_rows", "line 61")
    dataset = finish(api.client, upload, on_bad_row="skip")
    assert (dataset.status_code, dataset.json()["skipped"]) == (201, 1)


def test_a_repeated_request_has_one_effect(api: World) -> None:
    upload = sent(api.client)
    first, again = finish(api.client, upload, "one"), finish(api.client, upload, "one")
    assert (first.status_code, again.json()) == (201, first.json())
    assert again.headers["idempotent-replayed"] == "true"
    refused(finish(api.client, upload, "one", on_bad_row="skip"), 422, "idempotency_key_reused", "Idempotency-Key")
    assert len(api.client.get(DATASETS).json()["data"]) == 1


def test_of_several_requests_at_once_one_makes_a_dataset(api: World) -> None:
    upload = sent(api.client)
    answers = at_once([lambda: finish(api.client, upload)] * 3)
    assert sorted(answer.status_code for answer in answers)[0] == 201
    assert {answer.json().get("code") for answer in answers} <= {None, "upload_in_use", "upload_not_found"}
    assert len(api.client.get(DATASETS).json()["data"]) == 1


def test_a_request_that_comes_while_another_reads_waits_and_gets_its_answer(
    api: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, meanwhile = sent(api.client), []
    convert = router.convert

    def converting(*arguments: Any, **options: Any) -> Any:
        meanwhile.extend(finish(api.client, upload, key) for key in ("one", "two"))
        return convert(*arguments, **options)

    monkeypatch.setattr(router, "convert", converting)
    first = finish(api.client, upload, "one")
    for answer in meanwhile:
        refused(answer, 409, "upload_in_use", "upload")
        assert answer.headers["x-should-retry"] == "true"
    assert first.status_code == 201
    assert finish(api.client, upload, "one").json() == first.json()
    refused(finish(api.client, upload, "two"), 404, "upload_not_found")


def test_who_ended_while_it_read_is_in_the_way_for_a_minute_only(api: World) -> None:
    upload = sent(api.client)
    with api.sessions.begin() as session:
        assert repository.begin_reading(session, upload)
    refused(finish(api.client, upload), 409, "upload_in_use", "upload")
    with api.engine.begin() as connection:
        statement = "UPDATE uploads SET read_until = read_until - interval '61 s' WHERE id = :id"
        connection.execute(text(statement), {"id": upload})
    assert finish(api.client, upload).status_code == 201


def test_of_the_same_part_at_once_one_counts(api: World) -> None:
    upload = begun(api.client)["id"]
    answers = at_once([lambda: put(api.client, upload, 0)] * 4)
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
    assert api.client.get(f"{UPLOADS}/{upload}").json()["received"] == 1
    sent_rest(api.client, api.client.get(f"{UPLOADS}/{upload}").json())
    assert finish(api.client, upload).status_code == 201


def test_a_connection_that_breaks_costs_its_part_alone(api: World) -> None:
    with serving(api.app) as url, httpx.Client(base_url=url, headers=api.client.headers) as client:
        upload = begun(client)
        path = f"{UPLOADS}/{upload['id']}"
        for number, part in enumerate(PARTS):
            for cut in (0, 1, len(part) // 2, len(part) - 1):
                with connected(url) as connection:
                    connection.head(
                        "PUT",
                        f"{path}/parts/{number}",
                        authorization=f"Bearer {api.key}",
                        content_length=str(len(part)),
                    )
                    connection.send(part[:cut])
            assert client.get(path).json()["received"] == number
            assert put(client, upload["id"], number).status_code == 200
        until("every request has ended", lambda: api.app.state.shares.uploads.held == 0)
        assert client.get(path).json()["received"] == len(PARTS)
        assert finish(client, upload["id"]).status_code == 201
    assert stored(api) == set()
    assert list(api.store.temporary_folder.iterdir()) == [], "nothing half-written is left"


def test_a_deletion_frees_its_bytes_and_ends_what_is_sent(api: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = used(api.client)
    upload = begun(api.client)["id"]
    put(api.client, upload, 0)
    count_part = repository.count_part

    def after_a_deletion(session: Any, upload_id: str, number: int) -> bool:
        assert api.client.delete(f"{UPLOADS}/{upload_id}").status_code == 204
        return count_part(session, upload_id, number)

    monkeypatch.setattr(repository, "count_part", after_a_deletion)
    refused(put(api.client, upload, 1), 404, "upload_not_found")
    assert (stored(api), used(api.client)) == (set(), before)
    refused(api.client.delete(f"{UPLOADS}/{upload}"), 404, "upload_not_found")


def test_a_key_has_so_many_uploads_and_bytes(api: World) -> None:
    client = limited(api, open_uploads=2, stored_bytes=3 * len(CONTENT))
    begun(client), begun(client, CONTENT[:-1])
    third = {"bytes": 5, "sha256": "0" * 64}
    answer = refused(client.post(UPLOADS, json=third), 429, "quota_exceeded", "open_uploads")
    assert answer.headers["x-should-retry"] == "false"
    assert begun(client, status=200)["received"] == 0, "the same again is no other one"
    assert used(client, "open_uploads") == 2
    upload = begun(client, CONTENT[:-1], status=200)["id"]
    client.delete(f"{UPLOADS}/{upload}")
    too_much = {"bytes": 2 * len(CONTENT) + 1, "sha256": "0" * 64}
    refused(client.post(UPLOADS, json=too_much), 429, "quota_exceeded", "stored_bytes")
    assert client.post(UPLOADS, json={**too_much, "bytes": 2 * len(CONTENT)}).status_code == 201


def test_an_upload_that_fills_the_quota_still_becomes_a_dataset(api: World) -> None:
    size = api.client.post(DATASETS, params={"name": "d"}, content=CONTENT).json()["byte_count"]
    client = limited(api, stored_bytes=max(size, len(CONTENT)))
    assert finish(client, sent(client)).status_code == 201
    refused(client.post(DATASETS, params={"name": "d"}, content=CONTENT), 429, "quota_exceeded", "stored_bytes")


def test_begun_at_once_they_do_not_pass_the_limit(api: World) -> None:
    client = limited(api, open_uploads=2)
    bodies = [{"bytes": 5, "sha256": f"{i:064}"} for i in (1, 2, 3, 4, 1)]
    answers = at_once([lambda body=body: client.post(UPLOADS, json=body).status_code for body in bodies])
    assert answers.count(201) == 2
    assert used(client, "open_uploads") == 2


def test_what_is_too_large_is_refused_before_it_is_sent(api: World) -> None:
    body = {"bytes": api.settings.uploads.max_bytes + 1, "sha256": "0" * 64}
    refused(api.client.post(UPLOADS, json=body), 413, "upload_too_large")


def test_another_tenants_upload_makes_no_dataset(api: World) -> None:
    upload = sent(api.client)
    refused(finish(api.other, upload), 404, "upload_not_found")
    assert finish(api.client, upload).status_code == 201


def test_the_rows_that_were_read_are_told_while_it_is_converted(api: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_NOTE_SECONDS", 0.0)
    upload, seen = sent(api.client), []
    note_reading = repository.note_reading

    def looked_at(session: Any, upload_id: str, rows: int) -> None:
        note_reading(session, upload_id, rows)
        session.commit()
        seen.append(api.client.get(f"{UPLOADS}/{upload_id}").json()["rows_read"])

    monkeypatch.setattr(repository, "note_reading", looked_at)
    assert finish(api.client, upload).status_code == 201
    assert seen
    assert seen == sorted(seen)
    assert seen[-1] < 60


def test_a_store_without_room_is_said_and_the_upload_goes_on_later(api: World, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = begun(api.client)["id"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "keep", full)
        answer = put(api.client, upload, 0)
    refused(answer, 503, "storage_full")
    assert answer.headers["x-should-retry"] == "true"
    assert finish(api.client, sent_rest(api.client, begun(api.client, status=200))).status_code == 201


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device", "part")


def test_both_are_in_the_audit_log(api: World) -> None:
    client = limited(api)
    upload = begun(client)["id"]
    client.delete(f"{UPLOADS}/{upload}")
    entries = client.get("/v1/audit-log", params={"object_id": upload}).json()["data"]
    assert [entry["action"] for entry in entries] == ["upload.deleted", "upload.created"]
