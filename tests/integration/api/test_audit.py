"""The audit log: every change leaves one entry in its own transaction, its tenant's admins read it, and nobody changes it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from support.jobs import HandmadeJobs
from support.world import DATASETS, JOBS, SECRET, make_settings, register_model

from service.audit import service as audit
from service.audit.tables import AuditEntry
from service.auth.principal import Scope
from service.ids import new_id
from service.keys.service import create_key
from service.retention.service import collect
from service.settings import RetentionSettings

LOG, KEYS, HOOKS, UPLOADS = "/v1/audit-log", "/v1/keys", "/v1/webhooks", "/v1/uploads"
TENANT = new_id("tenant")
HOOK = {"url": "https://127.0.0.1/hook"}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def world(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandmadeJobs]:
    settings = make_settings(
        postgres_url, tmp_path_factory.mktemp("audit"), webhooks={"allowed_networks": ["127.0.0.0/8"]}
    )
    register_model(settings)
    with HandmadeJobs.made(settings, scopes=Scope, tenants=(TENANT, new_id("tenant"))) as made:
        yield made


def entries(world: HandmadeJobs, client: TestClient | None = None, **filters: Any) -> list[Json]:
    answer = (client or world.client).get(LOG, params={"limit": 1000, **filters})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


def hook(world: HandmadeJobs) -> str:
    return str(world.client.post(HOOKS, json=HOOK).json()["id"])


def delivery(world: HandmadeJobs) -> str:
    made = hook(world)
    return f"{HOOKS}/{made}/deliveries/{world.client.post(f'{HOOKS}/{made}/test').json()['id']}/replay"


def key(world: HandmadeJobs) -> str:
    return str(world.client.post(KEYS, json={"name": "k"}).json()["id"])


def upload(world: HandmadeJobs) -> str:
    return str(world.client.post(UPLOADS, json={"bytes": 1, "sha256": "1" * 64}).json()["id"])


# Of each call that changes something: what it acts on, made beforehand, as the path; its body; and the entry that it leaves.
Made = Callable[[HandmadeJobs], str]
CHANGES: dict[tuple[str, str], tuple[Made, Json, str]] = {
    ("post", DATASETS): (lambda _: f"{DATASETS}?name=x", {"prompt": "a", "completion": "b"}, "dataset.created"),
    ("delete", f"{DATASETS}/{{dataset_id}}"): (lambda w: f"{DATASETS}/{w.dataset('x')['id']}", {}, "dataset.deleted"),
    ("post", UPLOADS): (lambda _: UPLOADS, {"bytes": 1, "sha256": "0" * 64}, "upload.created"),
    ("delete", f"{UPLOADS}/{{upload_id}}"): (lambda w: f"{UPLOADS}/{upload(w)}", {}, "upload.deleted"),
    ("post", JOBS): (
        lambda _: JOBS,
        {"model": "small", "pool": "pool", "target": "pool", "budget": 1},
        "selection_job.created",
    ),
    ("patch", f"{JOBS}/{{job_id}}"): (lambda w: f"{JOBS}/{w.failed()['id']}", {"name": "n"}, "selection_job.changed"),
    ("delete", f"{JOBS}/{{job_id}}"): (lambda w: f"{JOBS}/{w.failed()['id']}", {}, "selection_job.deleted"),
    ("post", f"{JOBS}/{{job_id}}/cancel"): (
        lambda w: f"{JOBS}/{w.queued()['id']}/cancel",
        {},
        "selection_job.cancelled",
    ),
    ("post", f"{JOBS}/{{job_id}}/retry"): (lambda w: f"{JOBS}/{w.failed()['id']}/retry", {}, "selection_job.retried"),
    ("post", f"{JOBS}/{{job_id}}/reproduce"): (
        lambda w: f"{JOBS}/{w.succeeded_with_results()['id']}/reproduce",
        {},
        "selection_job.reproduced",
    ),
    ("post", KEYS): (lambda _: KEYS, {"name": "ci"}, "key.created"),
    ("delete", f"{KEYS}/{{key_id}}"): (lambda w: f"{KEYS}/{key(w)}", {}, "key.revoked"),
    ("post", HOOKS): (lambda _: HOOKS, HOOK, "webhook.created"),
    ("patch", f"{HOOKS}/{{webhook_id}}"): (lambda w: f"{HOOKS}/{hook(w)}", {"description": "d"}, "webhook.updated"),
    ("delete", f"{HOOKS}/{{webhook_id}}"): (lambda w: f"{HOOKS}/{hook(w)}", {}, "webhook.deleted"),
    ("post", f"{HOOKS}/{{webhook_id}}/rotate-secret"): (
        lambda w: f"{HOOKS}/{hook(w)}/rotate-secret",
        {},
        "webhook.secret_rotated",
    ),
    ("post", f"{HOOKS}/{{webhook_id}}/test"): (lambda w: f"{HOOKS}/{hook(w)}/test", {}, "webhook.tested"),
    ("post", f"{HOOKS}/{{webhook_id}}/deliveries/{{delivery_id}}/replay"): (delivery, {}, "webhook.replayed"),
}


def test_the_calls_above_are_all_that_change_something(world: HandmadeJobs) -> None:
    document = world.client.get("/openapi.json").json()
    calls = {(method, path) for path, methods in document["paths"].items() for method in methods}
    # What is sent of an upload that was begun has no entry of its own: there would be hundreds.
    changing = {call for call in calls if call[0] not in ("get", "head")} - {
        ("put", f"{UPLOADS}/{{upload_id}}/parts/{{number}}")
    }
    assert changing == set(CHANGES), "a new call: say here what it leaves in the audit log"


@pytest.mark.parametrize("call", CHANGES)
def test_each_change_leaves_one_entry_that_says_who_and_what(world: HandmadeJobs, call: tuple[str, str]) -> None:
    make, body, action = CHANGES[call]
    method, path = call[0], make(world)
    if "pool" in body:
        body = body | dict.fromkeys(("pool", "target"), world.dataset("pool")["id"])
    before, sent = entries(world)[0]["id"] if entries(world) else 0, new_id("req")
    headers = {"X-Request-Id": sent, **({"Idempotency-Key": sent} if method == "post" else {})}
    answer = world.client.request(method, path, json=body or None, headers=headers)
    assert answer.is_success, answer.text
    new = [entry for entry in entries(world) if entry["id"] > before]
    assert [(entry["action"], entry["actor"], entry["request_id"]) for entry in new] == [(action, "api", sent)]
    assert new[0]["key"]["name"] == "test"
    assert new[0]["key"]["prefix"] in world.client.headers["authorization"]
    assert new[0]["object_id"] in {*path.split("/"), answer.json()["id"] if answer.content else None}
    if method == "post":
        assert world.client.request(method, path, json=body or None, headers=headers).content == answer.content
    elif method == "delete":
        world.client.delete(path)
    assert len([entry for entry in entries(world) if entry["id"] > before]) == 1, "what is repeated changes nothing"


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_what_is_refused_leaves_no_entry(world: HandmadeJobs, method: str, path: str) -> None:
    before = entries(world)
    ids = {
        "dataset_id": "ds",
        "upload_id": "up",
        "job_id": "job",
        "key_id": "key",
        "webhook_id": "whk",
        "delivery_id": "msg",
    }
    answer = world.client.request(
        method, path.format(**{name: new_id(prefix) for name, prefix in ids.items()}), json={}
    )
    assert answer.status_code in (404, 422), answer.text
    assert entries(world) == before


def test_an_entry_is_rolled_back_with_its_change(world: HandmadeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = world.dataset("kept")
    before = entries(world)
    record = audit.record

    def fail_after(*args: Any, **detail: Any) -> None:
        record(*args, **detail)
        args[0].flush()
        raise RuntimeError("after the entry was written")

    monkeypatch.setattr(audit, "record", fail_after)
    client = TestClient(world.app, headers=world.client.headers, raise_server_exceptions=False)
    assert client.delete(f"{DATASETS}/{dataset['id']}").status_code == 500
    assert entries(world) == before
    assert world.client.get(f"{DATASETS}/{dataset['id']}").status_code == 200


def test_exports_and_reads_of_the_record_are_entries_and_polls_are_not(world: HandmadeJobs) -> None:
    job = world.succeeded_with_results()["id"]
    before = entries(world)[0]["id"]
    for path in ("", "/results", "/selected", "/weights", "/events"):
        assert world.client.get(f"{JOBS}/{job}{path}").status_code == 200
    export = world.client.get(f"{JOBS}/{job}/export", params={"format": "csv", "selected_only": True})
    unchanged = {"If-None-Match": export.headers["etag"]}
    again = world.client.get(f"{JOBS}/{job}/export", params={"format": "csv", "selected_only": True}, headers=unchanged)
    assert (export.status_code, again.status_code) == (200, 304)
    assert world.client.get(f"{JOBS}/{job}/provenance").status_code == 200
    assert world.other.get(f"{JOBS}/{job}/export").status_code == 404
    new = [entry for entry in entries(world) if entry["id"] > before]
    assert [(entry["action"], entry["object_id"]) for entry in new] == [
        ("provenance.read", job),
        ("results.exported", job),
    ]
    assert new[1]["detail"] == {"format": "csv", "selected_only": True, "include": None}


def test_what_the_retention_deletes_is_written_by_the_system_and_stays(world: HandmadeJobs) -> None:
    job = world.failed()["id"]
    with world.app.state.sessions.begin() as session:
        session.execute(
            text("UPDATE selection_jobs SET finished_at = now() - interval '2 days' WHERE id = :id"), {"id": job}
        )
    retention = RetentionSettings(results_days=1)
    for _ in range(2):
        collect(world.app.state.sessions, world.app.state.store, retention)
    deleted, created = entries(world, object_id=job)
    assert (deleted["actor"], deleted["key"], deleted["action"]) == ("system", None, "selection_job.deleted")
    assert deleted["detail"] == {"reason": "retention"}
    assert created["action"] == "selection_job.created"


def test_pages_and_filters(world: HandmadeJobs) -> None:
    for _ in range(3):
        world.client.delete(f"{DATASETS}/{world.dataset('paged')['id']}")
    every = entries(world)
    assert [entry["id"] for entry in every] == sorted((entry["id"] for entry in every), reverse=True)
    paged: list[Json] = []
    page = world.client.get(LOG, params={"limit": 2}).json()
    while True:
        paged += page["data"]
        if not page["has_more"]:
            break
        page = world.client.get(LOG, params={"limit": 2, "after": page["last_id"]}).json()
    assert paged == every
    deleted = entries(world, action="dataset.deleted")
    assert deleted == [entry for entry in every if entry["action"] == "dataset.deleted"] != []
    third = every[2]
    assert entries(world, object_id=third["object_id"]) == [e for e in every if e["object_id"] == third["object_id"]]
    assert entries(world, key_id=third["key"]["id"]) == [e for e in every if e["key"] == third["key"]]
    assert third in entries(world, created_after=every[3]["created_at"], created_before=every[1]["created_at"])
    assert every[0] not in entries(world, created_before=every[0]["created_at"])
    assert entries(world, created_after=every[0]["created_at"]) == []


def test_only_the_tenants_admins_read_it(world: HandmadeJobs) -> None:
    assert {entry["id"] for entry in entries(world)}.isdisjoint(entry["id"] for entry in entries(world, world.other))
    with world.app.state.sessions.begin() as session:
        audit.record_own(session, "cli", None, "database.migrated", "database")
        made = create_key(
            session, tenant_name=TENANT, key_name="k", secret_key=SECRET, scopes=[Scope.READ, Scope.SUBMIT]
        )
    assert not entries(world, action="database.migrated"), "what is of no tenant is the operator's to read"
    answer = world.client.get(LOG, headers={"Authorization": f"Bearer {made}"})
    assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("after", "x"),
        ("after", 0),
        ("created_after", "yesterday"),
        ("created_after", "2026-01-01T00:00:00"),
        ("action", "\0"),
    ],
)
def test_a_filter_that_cannot_be_is_named(world: HandmadeJobs, name: str, value: Any) -> None:
    answer = world.client.get(LOG, params={name: value})
    assert (answer.status_code, answer.json()["param"]) == (422, name)


@pytest.fixture
def kept(world: HandmadeJobs) -> tuple[int, str]:
    """The newest entry, and a job with a provenance."""
    return entries(world)[0]["id"], world.succeeded_with_results()["id"]


_COLUMNS = "id, tenant_id, key_id, actor, action, object_id, request_id, detail, created_at"
_ENTRY = (
    f"INSERT INTO audit_log ({_COLUMNS}) OVERRIDING SYSTEM VALUE SELECT {_COLUMNS} FROM audit_log WHERE id = :entry"
)
_RECORD = "INSERT INTO provenance SELECT * FROM provenance WHERE job_id = :job"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_log SET actor = 'system' WHERE id = :entry",
        "DELETE FROM audit_log WHERE id = :entry",
        "TRUNCATE audit_log",
        f"{_ENTRY} ON CONFLICT (id) DO UPDATE SET action = 'x'",
        "MERGE INTO audit_log a USING (SELECT :entry AS id) b ON a.id = b.id WHEN MATCHED THEN UPDATE SET action = 'x'",
        "MERGE INTO audit_log a USING (SELECT :entry AS id) b ON a.id = b.id WHEN MATCHED THEN DELETE",
        "UPDATE provenance SET record = '{}' WHERE job_id = :job",
        "DELETE FROM provenance WHERE job_id = :job",
        "TRUNCATE provenance",
        "TRUNCATE selection_jobs CASCADE",
        "TRUNCATE tenants CASCADE",
        f"{_RECORD} ON CONFLICT (job_id) DO UPDATE SET record = '{{}}'",
        "MERGE INTO provenance p USING (SELECT :job AS id) j ON p.job_id = j.id WHEN MATCHED THEN UPDATE SET record = '{}'",
        "MERGE INTO provenance p USING (SELECT :job AS id) j ON p.job_id = j.id WHEN MATCHED THEN DELETE",
    ],
)
def test_no_statement_changes_what_was_written(world: HandmadeJobs, kept: tuple[int, str], statement: str) -> None:
    entry, job = kept
    parameters = {name: value for name, value in (("entry", entry), ("job", job)) if f":{name}" in statement}
    both = "SELECT to_jsonb(a) || to_jsonb(p) FROM audit_log a, provenance p WHERE a.id = :entry AND p.job_id = :job"
    with world.app.state.engine.connect() as connection:
        before = connection.scalar(text(both), {"entry": entry, "job": job})
    with pytest.raises(DBAPIError, match=r"append-only|immutable"), world.app.state.engine.begin() as connection:
        connection.execute(text(statement), parameters)
    with world.app.state.engine.connect() as connection:
        assert connection.scalar(text(both), {"entry": entry, "job": job}) == before is not None


def test_a_role_that_owns_no_table_cannot_turn_the_triggers_off(world: HandmadeJobs, kept: tuple[int, str]) -> None:
    role = f"app_{new_id('r')}"
    with world.app.state.engine.connect() as connection, connection.begin() as transaction:
        for statement in (
            f"CREATE ROLE {role} NOLOGIN",
            f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
            f"SET LOCAL ROLE {role}",
        ):
            connection.execute(text(statement))
        for statement in (
            "SET session_replication_role = replica",
            "ALTER TABLE audit_log DISABLE TRIGGER ALL",
            "ALTER TABLE provenance DISABLE TRIGGER provenance_refuse_truncate",
            "DROP TRIGGER audit_log_refuse_change ON audit_log",
        ):
            with pytest.raises(DBAPIError, match=r"permission denied|must be owner"), connection.begin_nested():
                connection.execute(text(statement))
        assert connection.scalar(text("SELECT count(*) FROM audit_log WHERE id = :id"), {"id": kept[0]}) == 1
        transaction.rollback()


def test_no_entry_holds_a_secret(world: HandmadeJobs) -> None:
    made = world.client.post(KEYS, json={"name": "secret"}).json()
    hooked = world.client.post(HOOKS, json={"url": "https://127.0.0.1/a-secret-path?token=a-secret-token"}).json()
    secrets = [made["key"].rsplit("_", 1)[1], hooked["secret"], "a-secret-path", "a-secret-token"]
    with world.app.state.sessions() as session:
        written = " ".join(str(entry.detail) for entry in session.query(AuditEntry))
    assert not [secret for secret in secrets if secret in written]
