"""API keys: made, listed and revoked by an admin of the tenant; what is kept of them; when they were used."""

import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import text
from support.ledger_world import at_once
from support.world import SECRET, World
from typer.testing import CliRunner

from service.auth.principal import Scope
from service.ids import new_id
from service.keys.service import create_key
from service.settings import ApiSettings, LimitSettings
from winnow.cli import main

KEYS = "/v1/keys"
Json = dict[str, Any]


@pytest.fixture
def tenant() -> str:
    return new_id("tenant")


@pytest.fixture
def admin(api: World, tenant: str) -> TestClient:
    """Its key has every scope."""
    with api.sessions.begin() as session:
        key = create_key(session, tenant_name=tenant, key_name="admin", secret_key=SECRET, scopes=tuple(Scope))
    return client_of(api, key)


def client_of(api: World, key: str) -> TestClient:
    return TestClient(api.client.app, headers={"Authorization": f"Bearer {key}"})


def make(admin: TestClient, **fields: Any) -> Json:
    response = admin.post(KEYS, json={"name": "k", **fields})
    assert response.status_code == 201, response.text
    return response.json()  # type: ignore[no-any-return]


def rows(api: World, what: str, **where: Any) -> list[Any]:
    with api.engine.connect() as connection:
        condition = " AND ".join(f"{name} = :{name}" for name in where)
        return list(connection.execute(text(f"SELECT {what} WHERE {condition}"), where))


def own_id(admin: TestClient) -> str:
    return str(admin.get(f"{KEYS}?limit=1000").json()["data"][-1]["id"])


def refused(response: Any, status: int, code: str, param: str | None = None) -> None:
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert response.json().get("param") == param


def test_a_key_is_made_shown_used_and_revoked(api: World, admin: TestClient) -> None:
    response = admin.post(KEYS, json={"name": "CI", "scopes": ["submit", "read", "read"], "expires_in_days": 30})
    made = response.json()
    key = made.pop("key")
    assert response.headers["location"] == f"{KEYS}/{made['id']}"
    assert response.headers["cache-control"] == "no-store"
    assert key.startswith(made["prefix"] + "_")
    assert (made["name"], made["scopes"], made["last_used_at"]) == ("CI", ["read", "submit"], None)
    left = datetime.fromisoformat(made["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < left <= timedelta(days=30)
    assert admin.get(f"{KEYS}/{made['id']}").json() == made
    assert admin.get(KEYS).json()["data"][0] == made
    client = client_of(api, key)
    assert client.get("/v1/datasets").status_code == 200
    refused(client.get(KEYS), 403, "insufficient_scope")
    for _ in range(2):
        assert admin.delete(f"{KEYS}/{made['id']}").status_code == 204
    assert client.get("/v1/datasets").status_code == 401
    assert admin.get(f"{KEYS}/{made['id']}").json()["revoked_at"] is not None
    entries = rows(api, "action, detail::text FROM audit_log", object_id=made["id"])
    assert [entry.action for entry in entries] == ["key.created", "key.revoked"]
    assert not [entry for entry in entries if key.split("_", 2)[2] in entry.detail]


def test_the_list_goes_in_pages_newest_first(admin: TestClient) -> None:
    made = [make(admin)["id"] for _ in range(4)]
    first = admin.get(KEYS, params={"limit": 3}).json()
    second = admin.get(KEYS, params={"limit": 3, "after": first["last_id"]}).json()
    assert [key["id"] for key in first["data"] + second["data"]] == [*reversed(made), own_id(admin)]
    assert (first["has_more"], second["has_more"]) == (True, False)
    refused(admin.get(KEYS, params={"after": "x"}), 422, "invalid_request", "after")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes.0"),
        ({"name": ""}, "name"),
        ({"name": "a\x00b"}, "name"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2100-01-01T00:00:00"}, "expires_at"),
        ({"expires_in_days": 0}, "expires_in_days"),
        ({"expires_in_days": 1, "expires_at": "2100-01-01T00:00:00Z"}, "body"),
        ({"limits": {"concurrent_jobs": -1}}, "limits.concurrent_jobs"),
        ({"limits": {"jobs": 1}}, "limits.jobs"),
        ({"digest": "00"}, "digest"),
    ],
)
def test_what_makes_no_key_is_named(admin: TestClient, fields: Json, param: str) -> None:
    refused(admin.post(KEYS, json={"name": "k", **fields}), 422, "invalid_request", param)


def test_a_key_gives_only_what_it_has(api: World, admin: TestClient, tenant: str) -> None:
    only_admin = client_of(api, make(admin, scopes=["admin"], limits={"concurrent_jobs": 5})["key"])
    refused(only_admin.post(KEYS, json={"name": "k", "scopes": ["read"]}), 403, "insufficient_scope", "scopes")
    made = make(only_admin, scopes=["admin"])
    assert made["limits"]["concurrent_jobs"] == 5, "what it makes has its limits"
    assert make(only_admin, scopes=["admin"], limits={"concurrent_jobs": 4})["limits"]["concurrent_jobs"] == 4
    for more in (6, 0):
        response = only_admin.post(KEYS, json={"name": "k", "scopes": ["admin"], "limits": {"concurrent_jobs": more}})
        refused(response, 422, "invalid_request", "limits.concurrent_jobs")
    refused(
        admin.post(KEYS, json={"name": "k", "limits": {"stored_bytes": LimitSettings().stored_bytes + 1}}),
        *(422, "invalid_request", "limits.stored_bytes"),
    )


def test_a_key_made_twice_under_one_idempotency_key_is_one_and_is_kept_sealed(api: World, admin: TestClient) -> None:
    first, again = (admin.post(KEYS, json={"name": "k"}, headers={"Idempotency-Key": "once"}) for _ in range(2))
    assert first.json() == again.json()
    assert len(admin.get(KEYS).json()["data"]) == 2
    secret = first.json()["key"].split("_", 2)[2]
    with api.engine.connect() as connection:
        tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).all()
        found = {t for t in tables for row in connection.scalars(text(f"SELECT t::text FROM {t} t")) if secret in row}
        sealed = connection.scalars(text("SELECT sealed_body FROM idempotency_keys")).all()
    assert found == set()
    assert not [body for body in sealed if secret.encode() in bytes(body)]


def test_a_key_may_revoke_itself_but_not_the_last_that_can(admin: TestClient, api: World) -> None:
    second = client_of(api, make(admin, scopes=["admin"])["key"])
    make(admin, scopes=["admin"], expires_at=(datetime.now(UTC) + timedelta(seconds=1)).isoformat())
    own = own_id(admin)
    assert admin.delete(f"{KEYS}/{own}").status_code == 204
    assert admin.get(KEYS).status_code == 401
    live = [k for k in second.get(KEYS).json()["data"] if k["revoked_at"] is None and k["expires_at"] is None]
    with api.engine.begin() as connection:
        connection.execute(text("UPDATE api_keys SET expires_at = now() WHERE expires_at > now()"))
    refused(second.delete(f"{KEYS}/{live[0]['id']}"), 409, "last_admin_key")
    assert second.delete(f"{KEYS}/{own}").status_code == 204, "one that is revoked already stays so"
    assert second.get(KEYS).status_code == 200


def test_of_two_admins_that_revoke_each_other_one_is_left(admin: TestClient, api: World) -> None:
    for _ in range(5):
        made = make(admin, scopes=["read", "submit", "admin"])
        second, first_id = client_of(api, made["key"]), own_id(admin)
        outcomes = at_once(
            [lambda: admin.delete(f"{KEYS}/{made['id']}"), lambda: second.delete(f"{KEYS}/{first_id}")]  # noqa: B023
        )
        statuses = {outcome.status_code for outcome in outcomes}
        assert statuses <= {204, 401, 409}
        assert statuses != {204}
        with api.engine.begin() as connection:  # the first one lives again
            connection.execute(text("UPDATE api_keys SET revoked_at = NULL WHERE id = :id"), {"id": first_id})
        admin.delete(f"{KEYS}/{made['id']}")


# What is kept


def test_what_is_kept_of_a_key_cannot_be_had_without_the_secret(api: World, admin: TestClient) -> None:
    made = make(admin)
    [row] = rows(api, "digest, t::text AS everything FROM api_keys t", id=made["id"])
    key, secret = made["key"], made["key"].split("_", 2)[2]
    assert secret not in row.everything
    assert secret.encode().hex() not in row.everything
    assert bytes(row.digest) == hmac.new(SECRET.encode(), key.encode(), hashlib.sha256).digest()
    for name in hashlib.algorithms_guaranteed - {"shake_128", "shake_256"}:
        for guess in (key, secret):
            assert hashlib.new(name, guess.encode()).digest() != bytes(row.digest), name
            assert hmac.new(b"", guess.encode(), "sha256").digest() != bytes(row.digest)


def test_keys_are_compared_in_constant_time_and_only_so(api: World, admin: TestClient, monkeypatch: Any) -> None:
    key = make(admin)["key"]
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
    client, real, seen = client_of(api, key), hmac.compare_digest, []

    def compare(a: bytes, b: bytes) -> bool:
        seen.append((bytes(a), bytes(b)))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for sent, status in ((key, 200), (wrong, 401), (f"wnw_{'0' * 12}_{'A' * 43}", 401)):
        seen.clear()
        answer = client.get("/v1/datasets", headers={"Authorization": f"Bearer {sent}"})
        assert answer.status_code == status
        assert [len(side) for pair in seen for side in pair] == [32, 32], "a digest with a digest, known prefix or not"
    monkeypatch.setattr(hmac, "compare_digest", lambda *_: False)
    assert client.get("/v1/datasets").status_code == 401, "nothing else lets a key in"


# Last use


def last_used(api: World, key_id: str) -> datetime | None:
    return rows(api, "last_used_at FROM api_keys", id=key_id)[0][0]  # type: ignore[no-any-return]


def age(api: World, key_id: str, seconds: int) -> datetime:
    with api.engine.begin() as connection:
        moved = text("UPDATE api_keys SET last_used_at = now() - make_interval(secs => :s) WHERE id = :id RETURNING 1")
        connection.execute(moved, {"s": seconds, "id": key_id})
    found = last_used(api, key_id)
    assert found is not None
    return found


def test_the_last_use_is_written_once_a_minute_also_by_a_request_that_fails(api: World, admin: TestClient) -> None:
    made = make(admin)
    client = client_of(api, made["key"])
    assert last_used(api, made["id"]) is None
    assert client.get("/v1/selection-jobs/none").status_code == 404
    assert last_used(api, made["id"]) is not None
    recent = age(api, made["id"], 50)
    assert client.get("/v1/datasets").status_code == 200
    assert last_used(api, made["id"]) == recent
    old = age(api, made["id"], 61)
    assert client.get(KEYS).status_code == 403
    assert last_used(api, made["id"]) > old  # type: ignore[operator]


def test_a_row_that_is_held_or_cannot_be_written_keeps_no_request_waiting(api: World, admin: TestClient) -> None:
    made = make(admin)
    client = client_of(api, made["key"])
    with api.engine.begin() as holder:
        holder.execute(text("SELECT FROM api_keys WHERE id = :id FOR UPDATE"), {"id": made["id"]})
        assert client.get("/v1/datasets").status_code == 200
    assert last_used(api, made["id"]) is None
    trigger = f"refuse_{made['id']}"
    with api.engine.begin() as connection:
        connection.execute(
            text(f"CREATE TRIGGER {trigger} BEFORE UPDATE ON api_keys FOR EACH ROW EXECUTE FUNCTION refuse_change()")
        )
    try:
        assert client.get("/v1/datasets").status_code == 200
    finally:
        with api.engine.begin() as connection:
            connection.execute(text(f"DROP TRIGGER {trigger} ON api_keys"))
    assert last_used(api, made["id"]) is None


# The command line


@pytest.fixture
def winnow(settings: ApiSettings, monkeypatch: pytest.MonkeyPatch) -> Any:
    values = {
        "DATABASE__URL": settings.database.url,
        "BROKER__URL": settings.broker.url,
        "ARTIFACTS__URL": settings.artifacts.url,
        "MODELS__FOLDER": str(settings.models.folder),
        "SECRET_KEY": SECRET,
    }
    for name, value in values.items():
        monkeypatch.setenv(f"WINNOW_{name}", value)
    monkeypatch.setattr("service.settings.api_settings", lambda: settings)
    return lambda *words: CliRunner().invoke(main.app, ["keys", *words])


def test_an_operator_makes_lists_and_revokes_keys(api: World, winnow: Any, tenant: str) -> None:
    done = winnow("create", "--tenant", tenant, "--name", "ops", "--scope", "read", "--scope", "admin")
    assert done.exit_code == 0, done.output
    key = done.stdout.strip()
    admin = client_of(api, key)
    plain = winnow("create", "--tenant", tenant, "--expires-in-days", "2").stdout.strip()
    assert admin.post(KEYS, json={"name": "k", "scopes": ["read"]}).status_code == 201
    listed = json.loads(winnow("list", "--tenant", tenant, "--json").stdout)
    assert [(k["name"], k["scopes"], k["tenant"]) for k in listed] == [
        ("ops", ["admin", "read"], tenant),
        ("default", ["read", "submit"], tenant),
        ("k", ["read"], tenant),
    ]
    assert listed[1]["expires_at"] is not None
    shown = winnow("list").stdout
    assert listed[0]["prefix"] in shown
    assert key.split("_", 2)[2] not in shown + json.dumps(listed)
    for word in (listed[0]["prefix"], listed[1]["id"], plain):
        assert winnow("revoke", word).exit_code == 0
    assert {client_of(api, k).get("/v1/datasets").status_code for k in (key, plain)} == {401}
    for listing in listed[:2]:
        entries = rows(api, "actor, action FROM audit_log", object_id=listing["id"])
        assert sorted(entries) == [("cli", "key.created"), ("cli", "key.revoked")]
    missing = winnow("revoke", "wnw_000000000000")
    assert (missing.exit_code, "no key" in missing.output) == (1, True)


def test_a_secret_that_was_changed_lets_no_key_in(settings: ApiSettings, api: World, admin: TestClient) -> None:
    from service.app import create_app

    other = create_app(settings.model_copy(update={"secret_key": SecretStr("8f1b" * 4 + "c03d97ae5526f84a" * 2)}))
    client = TestClient(other, headers=admin.headers)
    assert (admin.get(KEYS).status_code, client.get(KEYS).status_code) == (200, 401)
    other.state.engine.dispose()
