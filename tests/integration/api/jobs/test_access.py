"""Keys that do not open, and what any key may see."""

from typing import Any

from sqlalchemy import select, text
from support.job_requests import URL, problem
from support.world import SECRET, World

from service.auth.tables import ApiKey
from service.ids import new_id
from service.keys.service import create_key


def _revoked(api: World) -> str:
    with api.sessions.begin() as session:
        key = create_key(session, tenant_name=new_id("tenant"), key_name="k", secret_key=SECRET)
        session.flush()
        row = session.scalars(select(ApiKey).where(ApiKey.prefix == key.split("_")[1])).one()
    headers = {"Authorization": f"Bearer {key}"}
    assert api.client.get(URL, headers=headers).status_code == 200
    with api.engine.begin() as connection:
        connection.execute(text("UPDATE api_keys SET revoked_at = now() WHERE id = :id"), {"id": row.id})
    return key


def test_no_key_a_bad_key_and_a_revoked_key_are_refused_alike(api: World) -> None:
    good = api.client.headers["authorization"].removeprefix("Bearer ")
    prefix = good.rsplit("_", 1)[0] if good.count("_") == 2 else "_".join(good.split("_")[:2])
    last = "A" if good[-1] != "A" else "B"
    bad = {
        "revoked": _revoked(api),
        "altered": good[:-1] + last,
        "another secret": f"{prefix}_{'A' * 43}",
        "cut": good[:-1],
        "longer": good + "A",
        "prefix only": prefix,
        "another scheme": "sk" + good[3:],
        "unknown": f"wnw_{'0' * 12}_{'A' * 43}",
        "nothing": "",
        "NUL": "wnw_\0_x",
        "not ASCII": "wnw_é_x".encode().decode("latin-1"),
    }
    headers = {name: f"Bearer {key}".encode("latin-1") for name, key in bad.items()}
    headers |= {"basic": b"Basic dXNlcjpwYXNz", "no scheme": good.encode()}
    del api.client.headers["authorization"]
    for method, path in (("GET", URL), ("POST", URL)):
        problem(api.client.request(method, path), 401, "unauthorized")
    details = set()
    for name, header in headers.items():
        response = api.client.get(URL, headers={"Authorization": header})
        assert response.status_code == 401, name
        assert response.headers["www-authenticate"] == "Bearer"
        details.add(problem(response, 401, "unauthorized")["detail"])
    assert len(details) == 2, "no key and a key that is not valid; nothing tells one bad key from another"
    assert api.client.get(URL, headers={"Authorization": f"Bearer {good}"}).status_code == 200


def test_a_tenant_has_all_its_keys_see_the_same(api: World, body: dict[str, Any]) -> None:
    name = new_id("tenant")
    with api.sessions.begin() as session:
        keys = [create_key(session, tenant_name=name, key_name=str(i), secret_key=SECRET) for i in range(2)]
    first, second = ({"Authorization": f"Bearer {key}"} for key in keys)
    data = b'{"text": "a"}\n'
    dataset = api.client.post("/v1/datasets", params={"name": "pool"}, content=data, headers=first).json()["id"]
    sent = {**body, "pool": dataset, "target": dataset, "budget": 1}
    job = api.client.post(URL, json=sent, headers=second).json()
    assert api.client.get(f"{URL}/{job['id']}", headers=first).json() == job


def test_the_request_id_of_the_caller_comes_back(api: World) -> None:
    for path in (URL, f"{URL}/none", "/v1/nowhere", "/healthz"):
        assert api.client.get(path, headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"


def test_the_registered_models_are_listed(api: World) -> None:
    found = api.client.get("/v1/models").json()
    assert [(model["name"], model["model_type"], model["blocks"]) for model in found["data"]] == [
        ("bert", "bert", 12),
        ("small", "llama", 6),
        ("whole", "llama", 6),
    ]
