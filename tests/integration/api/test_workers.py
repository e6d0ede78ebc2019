"""The workers as an admin of a tenant sees them: all of them, and of their work the tenant's own."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import select, text
from support.jobs import plain_rows
from support.world import JOBS, World, make_settings, register_model

from service.auth.principal import Scope
from service.ledger import claims
from service.ledger.tables import JobUnit
from service.ledger.workers import record_worker

URL = "/v1/workers"


@pytest.fixture(scope="module")
def world(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    settings = make_settings(postgres_url, tmp_path_factory.mktemp("workers"))
    register_model(settings)
    with World.made(settings, scopes=Scope) as made:
        forget_workers(made)
        yield made
        forget_workers(made)


def forget_workers(world: World) -> None:
    """The table of workers is one for all tenants."""
    with world.engine.begin() as connection:
        connection.execute(text("DELETE FROM workers"))


def claimed(world: World, client: Any, worker_id: str) -> str:
    """The id of a new job, whose unit the worker does."""
    content = "".join(json.dumps(row) + "\n" for row in plain_rows(4, worker_id))
    pool = client.post("/v1/datasets", params={"name": "pool"}, content=content).json()["id"]
    request = {"model": "small", "pool": pool, "target": pool, "budget": 1}
    job_id: str = client.post(JOBS, json=request).json()["id"]
    with world.sessions.begin() as session:
        unit_id = session.scalars(select(JobUnit.id).where(JobUnit.job_id == job_id)).one()
        assert claims.take(session, unit_id, worker_id, 600) is not None
    return job_id


def test_all_workers_are_there_with_the_tenants_own_work(world: World) -> None:
    own, theirs = (claimed(world, client, name) for client, name in ((world.client, "own"), (world.other, "theirs")))
    lacks = [
        {"problem": "no device", "seconds": 1},
        {"problem": "not theirs", "job_id": theirs, "seconds": 1},
        {"problem": "not ours", "job_id": own, "seconds": 1},
        {"problem": "no model of theirs", "model": {"kind": "hub", "id": "their/secret"}, "seconds": 1},
        {"problem": "no small", "model": {"kind": "registered", "name": "small"}, "seconds": 1},
    ]
    with world.sessions.begin() as session:
        for name in ("idle", "own", "silent", "stopped", "theirs"):
            record_worker(session, name, "v1", device="cuda:0", memory_bytes=2**30, stopped=name == "stopped")
        record_worker(session, "unable", "v2", lacks=lacks)
        long_ago = "UPDATE workers SET seen_at = now() - interval '2 minutes' WHERE worker_id = 'silent'"
        session.execute(text(long_ago))
    page = world.client.get(URL).json()
    found = {worker["id"]: worker for worker in page["data"]}
    assert list(found) == ["idle", "own", "silent", "theirs", "unable"]
    states = ["idle", "busy", "silent", "busy", "unable"]
    assert [worker["state"] for worker in found.values()] == states
    unit = {name: found["own"]["unit"][name] for name in ("job_id", "stage", "shard", "attempt", "done", "total")}
    assert unit == {"job_id": own, "stage": "prepare", "shard": 0, "attempt": 1, "done": 0, "total": 8}
    assert [name for name, worker in found.items() if worker["unit"]] == ["own"]
    assert theirs not in str(page)
    assert (found["idle"]["device"], found["idle"]["memory_bytes"], found["idle"]["version"]) == ("cuda:0", 2**30, "v1")
    model = world.client.get(f"{JOBS}/{own}").json()["model"]
    assert model == lacks[-1]["model"]
    assert found["unable"]["problems"] == ["no device", "no small", "not ours"]
    first = world.client.get(URL, params={"limit": 2}).json()
    after = world.client.get(URL, params={"after": first["last_id"]}).json()
    assert [worker["id"] for worker in first["data"] + after["data"]] == list(found)
    assert (first["has_more"], after["has_more"]) == (True, False)
