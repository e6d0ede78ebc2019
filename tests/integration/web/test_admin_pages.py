"""The pages of usage, keys and workers: what they show, what their forms do, and for whom they are."""

import re
from typing import Any

import pytest
from support.web import Visitor, visitor
from support.world import SECRET, World

from service.auth.principal import Scope
from service.keys.service import create_key
from service.ledger.workers import record_worker

PAGES = ("/keys", "/workers")
HOSTILE = "<script>alert(1)</script>"


def keys_of(world: World) -> dict[str, Any]:
    """By name."""
    return {key["name"]: key for key in world.client.get("/v1/keys").json()["data"]}


@pytest.fixture
def no_admin(world: World) -> Visitor:
    with world.sessions.begin() as session:
        key = create_key(
            session, tenant_name="no admin", key_name="k", secret_key=SECRET, scopes=(Scope.READ, Scope.SUBMIT)
        )
    return visitor(world, key)


def test_a_key_is_created_shown_once_and_revoked(world: World) -> None:
    admin = visitor(world)
    form = {"name": f"{HOSTILE} é", "scopes": ["read"], "expires_in_days": "3", "limits.concurrent_jobs": "2"}
    made = admin.send("/keys", form)
    assert made.status_code == 201
    assert HOSTILE not in made.text
    (key,) = re.findall(r"wnw_[0-9a-f]{12}_[\w-]{43}", made.text)
    assert made.headers["cache-control"] == "no-store"
    found = keys_of(world)[form["name"]]
    assert (found["scopes"], found["limits"]["concurrent_jobs"]) == (["read"], 2)
    assert found["expires_at"] is not None
    assert world.client.get("/v1/usage", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    listed = admin.get("/keys").text
    assert found["prefix"] in listed
    assert key not in listed
    assert admin.post(f"/keys/{found['id']}/revoke", {"form_token": "0" * 64}).status_code == 403
    assert keys_of(world)[form["name"]]["revoked_at"] is None
    assert admin.send(f"/keys/{found['id']}/revoke").status_code == 303
    assert world.client.get("/v1/usage", headers={"Authorization": f"Bearer {key}"}).status_code == 401


@pytest.mark.parametrize(
    ("changed", "field", "status"),
    [
        ({"name": ""}, "name", 422),
        ({"name": "\u202eeman"}, "name", 422),
        ({"scopes": []}, "scopes", 422),
        ({"scopes": ["root"]}, "scopes", 422),
        ({"expires_in_days": "0"}, "expires_in_days", 422),
        ({"limits.concurrent_jobs": "101"}, "limits.concurrent_jobs", 422),
        ({"limits.concurrent_jobs": "few"}, "limits.concurrent_jobs", 422),
    ],
)
def test_what_is_wrong_in_a_form_stands_at_its_field_and_the_rest_stays(
    world: World, changed: dict[str, Any], field: str, status: int
) -> None:
    admin, before = visitor(world), keys_of(world)
    form = {"name": "CI", "scopes": ["read"], "expires_in_days": "7", "limits.concurrent_jobs": "1", **changed}
    answer = admin.send("/keys", form)
    assert answer.status_code == status
    assert f'id="{field}-error"' in answer.text
    assert re.search(r"wnw_[0-9a-f]{12}_", answer.text) is None
    if "expires_in_days" not in changed:
        assert 'name="expires_in_days" type="number" min="1" max="3650" value="7"' in answer.text
    assert keys_of(world) == before


def test_no_form_of_another_site_or_session_creates_or_revokes(world: World) -> None:
    admin, before = visitor(world), keys_of(world)
    (own,) = before.values()
    for token in ("", "0" * 64, visitor(world).form_token()):
        assert admin.post("/keys", {"form_token": token, "name": "x", "scopes": ["read"]}).status_code == 403
        assert admin.post(f"/keys/{own['id']}/revoke", {"form_token": token}).status_code == 403
    assert keys_of(world) == before


def test_the_last_admin_key_and_another_tenants_stay(world: World) -> None:
    admin = visitor(world)
    (own,) = keys_of(world).values()
    assert admin.send(f"/keys/{own['id']}/revoke").status_code == 409
    (theirs,) = world.other.get("/v1/keys").json()["data"]
    assert admin.send(f"/keys/{theirs['id']}/revoke").status_code == 404
    assert theirs["prefix"] not in admin.get("/keys").text
    assert world.other.get("/v1/usage").status_code == 200


def test_pages_of_admins_are_for_admins(world: World, no_admin: Visitor) -> None:
    for path in PAGES:
        assert (no_admin.get(path).status_code, visitor(world).get(path).status_code) == (403, 200)
        assert f'href="{path}"' not in no_admin.get("/usage").text
    assert no_admin.send("/keys", {"name": "x", "scopes": ["admin"]}).status_code == 403
    assert Visitor(world).get("/usage").headers["location"].startswith("/login")


def test_the_usage_is_that_of_the_api(world: World) -> None:
    page = visitor(world).get("/usage").text
    usage = world.client.get("/v1/usage").json()
    assert usage["key_id"] in page
    assert f"{usage['samples_per_day']['limit']:,}" in page


def test_workers_are_shown_with_what_they_lack(world: World) -> None:
    with world.sessions.begin() as session:
        record_worker(session, "gpu-1:7", "v", device="cuda:0", memory_bytes=2**30)
        record_worker(session, "gpu-2:8", "v", lacks=[{"problem": HOSTILE, "seconds": 1}])
    page = visitor(world).get("/workers").text
    assert HOSTILE not in page
    for text in ("gpu-1:7", "cuda:0", "1.0 GiB", "idle", "gpu-2:8", "unable"):
        assert text in page
    assert "gpu-1:7" not in visitor(world).get("/workers?after=gpu-1:7").text
