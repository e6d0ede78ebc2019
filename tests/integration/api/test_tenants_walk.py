"""Every route of the OpenAPI document with the ids of another tenant: 404 as if they had never been, and nothing changes.

A new route is walked by itself. One with a path parameter that the walk cannot fill, or a body that it does not know, fails:
add the parameter to `make_tenant`, with an object, or the body to `BODIES`.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import text
from support.jobs import add_job, published
from support.raw_http import connected
from support.servers import Servers
from support.world import SECRET, World, own_settings, register_model, serving

from service.auth.principal import Scope
from service.datasets import repository as datasets
from service.datasets.tables import Dataset
from service.db.engine import Sessions
from service.ids import new_id
from service.keys.service import create_key
from service.ledger.state import JobStatus

OPEN_TO_ALL = {"/healthz", "/readyz", "/metrics"}
ADMIN = ("/v1/keys", "/v1/audit-log", "/v1/workers")
NO_IDS = {"index": "0", "number": "0"}  # path parameters that name a part of an object
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("patch", "/v1/selection-jobs/{job_id}"): {"name": "x", "labels": {"a": "b"}},
    ("patch", "/v1/webhooks/{webhook_id}"): {"description": "x"},
    ("put", "/v1/uploads/{upload_id}/parts/{number}"): {"some": "bytes"},
}
QUERIES: dict[tuple[str, str], dict[str, str]] = {
    ("get", "/v1/selection-jobs/{job_id}/samples"): {"id": "0"}
}  # required
# Fields of bodies that hold an id, with what a request needs beside them.
IDS_IN_BODIES = {"/v1/selection-jobs": ("pool", "target")}
Route = tuple[str, str, dict[str, Any]]
Values = dict[str, list[str]]


@dataclass(frozen=True)
class Tenant:
    """`ids`: what there is of it by path parameter; each of the queries' string parameters is tried with all of them."""

    client: TestClient
    ids: Values


@dataclass(frozen=True)
class Walk:
    app: FastAPI
    first: Tenant
    second: Tenant

    def image(self) -> dict[str, list[str]]:
        """Every row of every table, but for the moments at which keys were used."""
        with self.app.state.engine.connect() as connection:
            tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).all()
            rows = "SELECT (to_jsonb(t) - 'last_used_at')::text FROM {} t ORDER BY 1"
            return {table: list(connection.scalars(text(rows.format(table)))) for table in tables}

    def routes(self) -> list[Route]:
        paths = self.app.openapi()["paths"]
        return [
            (method, path, operation)
            for path, operations in paths.items()
            if path not in OPEN_TO_ALL
            for method, operation in operations.items()
        ]


def make_tenant(world: World, client: TestClient, key: str) -> Tenant:
    rows = "".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) + "\n" for i in range(4)).encode()
    dataset_id = client.post("/v1/datasets", params={"name": "d"}, content=rows).json()["id"]
    webhook = client.post("/v1/webhooks", json={"url": "https://127.0.0.1:8443/hook"})
    assert webhook.status_code == 201, webhook.text
    webhook_id = webhook.json()["id"]
    job = client.post(
        "/v1/selection-jobs", json={"model": "small", "pool": dataset_id, "target": dataset_id, "budget": 1}
    )
    assert job.status_code == 202, job.text
    jobs = [
        job.json()["id"],
        *(_job(world.sessions, key, dataset_id, status) for status in (JobStatus.SUCCEEDED, JobStatus.FAILED)),
    ]
    assert client.post(f"/v1/webhooks/{webhook_id}/test").is_success
    deliveries = client.get(f"/v1/webhooks/{webhook_id}/deliveries").json()["data"]
    made = client.post("/v1/keys", json={"name": "another"}).json()["id"]
    upload_id = client.post("/v1/uploads", json={"bytes": 7, "sha256": "0" * 64}).json()["id"]
    ids = {
        "dataset_id": [dataset_id],
        "upload_id": [upload_id],
        "job_id": jobs,
        "key_id": [made],
        "webhook_id": [webhook_id],
        "delivery_id": [deliveries[0]["id"]],
    }
    return Tenant(client, ids)


def _job(sessions: Sessions, key: str, dataset_id: str, status: JobStatus) -> str:
    with sessions() as session:
        content = session.get_one(Dataset, dataset_id)
    return (
        published(sessions, key, content) if status is JobStatus.SUCCEEDED else add_job(sessions, key, content, status)
    )


@pytest.fixture(scope="module")
def world(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    folder: Path = tmp_path_factory.mktemp("walk")
    with (
        own_settings(servers, folder, webhooks={"allowed_networks": ["127.0.0.0/8"]}) as settings,
        World.made(settings, scopes=Scope) as world,
    ):
        register_model(settings)
        # The second tenant's objects are the older ones: a page `after` anything else holds them all.
        second = make_tenant(world, world.other, world.other_key)
        yield Walk(world.app, make_tenant(world, world.client, world.key), second)


def parameters(path: str) -> list[str]:
    return [name for name in re.findall(r"{(\w+)}", path) if name not in NO_IDS]


def filled(path: str, values: dict[str, str]) -> str:
    return path.format(**NO_IDS, **values)


def unknown(value: str) -> str:
    """An id of the same kind that never was."""
    return new_id(value.rpartition("_")[0])


def shape(response: Any, *values: str) -> tuple[int, Any, dict[str, str]]:
    """Status, body and headers without the ids that were asked for and the request's own."""
    body = response.text
    for value in values:
        body = body.replace(value, "ID")
    content = json.loads(body)
    content.pop("request_id", None)
    return response.status_code, content, {n: v for n, v in response.headers.items() if n != "x-request-id"}


def send(tenant: Tenant, method: str, path: str, operation: dict[str, Any], url: str, **more: Any) -> Any:
    if operation.get("requestBody", {}).get("required") and "json" not in more and "{" in path:
        assert (method, path) in BODIES, f"{method} {path} needs a body that the walk does not know: add it to BODIES"
        more["json"] = BODIES[method, path]
    if (method, path) in QUERIES:
        more["params"] = QUERIES[method, path]
    return tenant.client.request(method, url, **more)


def choices(world: Walk, path: str) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Ids of the first tenant, alone and below objects of the second one's own; with each the same with ids that never were."""
    names = parameters(path)
    for name in names:
        assert name in world.first.ids, f"{path}: the walk has nothing for {{{name}}}: give both tenants one"
    for i in range(len(names)):  # those before the i-th are the second tenant's own
        own = [world.second.ids[name][:1] for name in names[:i]]
        theirs = [world.first.ids[name] for name in names[i:]]
        for values in itertools.product(*own, *theirs):
            asked = dict(zip(names, values, strict=True))
            yield asked, {n: v if n in names[:i] else unknown(v) for n, v in asked.items()}


def test_what_is_another_tenants_is_404_as_if_it_had_never_been(world: Walk) -> None:
    before, wrong, walked = world.image(), [], 0
    for method, path, operation in world.routes():
        for asked, absent in choices(world, path):
            found = send(world.second, method, path, operation, filled(path, asked))
            expected = send(world.second, method, path, operation, filled(path, absent))
            if found.status_code != 404 or shape(found, *asked.values()) != shape(expected, *absent.values()):
                wrong.append((method, path, asked, found.status_code, found.text[:200], expected.text[:200]))
            walked += 1
    assert wrong == []
    assert walked > 20
    after = world.image()
    assert {table for table in before if before[table] != after[table]} == set(), (
        "refused, and yet something was written"
    )


@pytest.mark.parametrize("malformed", ["%00", "x", "0" * 31, "G" * 32, "%27--", "%F0%9F%98%80"])
def test_an_id_that_cannot_be_is_not_found(world: Walk, malformed: str) -> None:
    for method, path, operation in world.routes():
        own = {name: world.first.ids[name][0] for name in parameters(path)}
        for name, value in own.items():
            for id in (malformed, f"{value.rpartition('_')[0]}_{malformed}"):
                answer = send(world.first, method, path, operation, filled(path, {**own, name: id}))
                assert answer.status_code == 404, (method, path, id, answer.text)


def test_the_ids_of_the_walk_are_there_for_their_own_tenant(world: Walk) -> None:
    """Else the walk would prove nothing."""
    for method, path, operation in world.routes():
        if method != "get" or not parameters(path):
            continue
        values = [world.first.ids[name] for name in parameters(path)]
        urls = [filled(path, dict(zip(parameters(path), each, strict=True))) for each in itertools.product(*values)]
        answers = [send(world.first, method, path, operation, url) for url in urls]
        assert any(answer.is_success for answer in answers), (path, [answer.text for answer in answers])
        assert all(answer.status_code in (200, 409) for answer in answers), path


def test_no_list_tells_of_another_tenant_whatever_it_is_asked(world: Walk) -> None:
    theirs = [value for values in world.first.ids.values() for value in values]
    lists = [route for route in world.routes() if route[0] == "get" and not parameters(route[1])]
    assert {path for _, path, _ in lists} >= {"/v1/datasets", "/v1/selection-jobs", "/v1/keys", "/v1/webhooks"}
    for _, path, operation in lists:
        plain = world.second.client.get(path)
        assert plain.status_code == 200, path
        assert not [value for value in theirs if value in plain.text], path
        for parameter in operation.get("parameters", []):
            if parameter["in"] != "query":
                continue
            for value in theirs:
                absent = unknown(value)
                found, expected = (
                    world.second.client.get(path, params={parameter["name"]: v}) for v in (value, absent)
                )
                assert shape(found, value) == shape(expected, absent), (path, parameter["name"])


@pytest.mark.parametrize("field", IDS_IN_BODIES["/v1/selection-jobs"])
def test_a_job_cannot_be_given_another_tenants_dataset(world: Walk, field: str) -> None:
    own, theirs = world.second.ids["dataset_id"][0], world.first.ids["dataset_id"][0]
    before, absent = world.image(), unknown(theirs)
    body = {"model": "small", "pool": own, "target": own, "budget": 1}
    for more in ({}, {"dry_run": True}):
        found, expected = (
            world.second.client.post("/v1/selection-jobs", json={**body, field: value, **more})
            for value in (theirs, absent)
        )
        assert found.status_code == 422
        assert shape(found, theirs) == shape(expected, absent)
        assert found.json()["param"] == field
    assert world.image() == before


def test_the_same_content_of_two_tenants_is_looked_for_in_the_own_one(world: Walk) -> None:
    with world.app.state.sessions() as session:
        first, second = (
            session.get_one(Dataset, tenant.ids["dataset_id"][0]) for tenant in (world.first, world.second)
        )
        assert first.fingerprint == second.fingerprint
        for dataset in (first, second):
            found = datasets.live_content_kept(session, dataset.tenant_id, dataset.fingerprint)
            assert found is not None
            assert found.tenant_id == dataset.tenant_id
        assert datasets.live_content_kept(session, new_id("tnt"), first.fingerprint) is None


# Keys that do not open


def make_key(world: Walk, *scopes: Scope, expires_at: datetime | None = None) -> dict[str, str]:
    with world.app.state.sessions.begin() as session:
        name = new_id("tenant")
        key = create_key(
            session, tenant_name=name, key_name="k", secret_key=SECRET, scopes=scopes, expires_at=expires_at
        )
    return {"Authorization": f"Bearer {key}"}


def ask_all(world: Walk, headers: Callable[[str, str], dict[str, str]]) -> list[tuple[str, str, Any]]:
    """The answer of every route, asked for what is not there with bodies that are empty: nothing changes."""
    nobody = TestClient(world.app)
    answers = []
    for method, path, _ in world.routes():
        url = filled(path, {name: unknown(world.first.ids[name][0]) for name in parameters(path)})
        body = None if method in ("get", "delete") else {}
        answers.append((method, path, nobody.request(method, url, json=body, headers=headers(method, path))))
    assert len(answers) > 20
    return answers


def scope_of(method: str, path: str) -> Scope:
    if path.startswith(ADMIN):
        return Scope.ADMIN
    return Scope.READ if method == "get" else Scope.SUBMIT


def test_every_route_needs_a_key_that_is_alive(world: Walk) -> None:
    expired = make_key(world, *Scope, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    revoked = make_key(world, *Scope)
    prefix = revoked["Authorization"].split("_")[1]
    with world.app.state.engine.begin() as connection:
        connection.execute(text("UPDATE api_keys SET revoked_at = now() WHERE prefix = :prefix"), {"prefix": prefix})
    invalid = {"Authorization": f"Bearer wnw_{'0' * 12}_{'A' * 43}"}
    told = set()
    for headers in ({}, expired, revoked, invalid):
        for method, path, answer in ask_all(world, lambda *_, headers=headers: headers):  # type: ignore[misc]
            assert answer.status_code == 401, (method, path, answer.text)
            told |= {answer.json()["detail"]} if headers else set()
    assert len(told) == 1, "nothing tells an expired or revoked key from one that never was"


def test_every_route_needs_its_scope_and_no_other(world: Walk) -> None:
    only = {scope: make_key(world, scope) for scope in Scope}
    lacking = {scope: make_key(world, *(other for other in Scope if other is not scope)) for scope in Scope}
    for method, path, answer in ask_all(world, lambda method, path: lacking[scope_of(method, path)]):
        assert (answer.status_code, answer.json().get("code")) == (403, "insufficient_scope"), (method, path)
    for method, path, answer in ask_all(world, lambda method, path: only[scope_of(method, path)]):
        assert answer.status_code not in (401, 403), (method, path, answer.text)


def test_every_route_documents_what_all_of_them_may_answer(world: Walk) -> None:
    for method, path, operation in world.routes():
        assert {"401", "403", "429"} <= set(operation["responses"]), (method, path)


def test_every_route_asks_for_the_key_before_the_body(world: Walk) -> None:
    """Which is announced and never comes."""
    for expecting in ({}, {"expect": "100-continue"}):
        assert heads_answered(world, lambda *_, more=expecting: more) == {401}  # type: ignore[misc]


def test_every_route_asks_for_the_scope_before_the_body(world: Walk) -> None:
    lacking = {scope: make_key(world, *(other for other in Scope if other is not scope)) for scope in Scope}
    found = heads_answered(world, lambda method, path: {"expect": "100-continue", **lacking[scope_of(method, path)]})
    assert found == {403}


def heads_answered(world: Walk, headers: Callable[[str, str], dict[str, str]]) -> set[int]:
    """The statuses that the routes answer heads with."""
    statuses = set()
    with serving(world.app) as url:
        for method, path, _ in world.routes():
            filled_in = filled(path, {name: unknown(world.first.ids[name][0]) for name in parameters(path)})
            kind, length = "application/json", str(2**30)
            with connected(url) as connection:
                more = headers(method, path)
                connection.head(method.upper(), filled_in, content_type=kind, content_length=length, **more)
                statuses.add(connection.answer()[0])
    return statuses
