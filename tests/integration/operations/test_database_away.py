"""What the API answers while the database does not, or while the store has no room; and that it goes on when they are back."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event, text
from support.servers import Servers
from support.shares import holding
from support.world import World, own_settings

from service.ids import new_id
from service.storage.artifacts import ArtifactStore

JOBS = "/v1/selection-jobs"


def problem(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == code
    return response.json()


@pytest.fixture
def served(servers: Servers, tmp_path: Path) -> Iterator[tuple[TestClient, Engine]]:
    """An API over a database of its own, without a dispatcher."""
    with own_settings(servers, tmp_path, pool_size=1) as settings, World.made(settings) as world:
        yield world.client, world.engine


@contextmanager
def away(postgres_url: str, engine: Engine) -> Iterator[None]:
    """Nobody is let in, and who was in is thrown out: what clients see of a server that stops."""
    name = engine.url.database
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        try:
            yield
        finally:
            server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def test_while_the_database_is_away_every_call_says_so_and_then_works_again(
    served: tuple[TestClient, Engine], postgres_url: str
) -> None:
    client, engine = served
    assert client.get(JOBS).status_code == 200
    with away(postgres_url, engine):
        for method, path, sent in (
            ("GET", JOBS, None),
            ("POST", JOBS, b"{}"),
            ("DELETE", f"{JOBS}/{new_id('job')}", None),
            ("POST", "/v1/datasets?name=pool", b'{"text": "t"}'),
        ):
            response = client.request(method, path, content=sent)
            body = problem(response, 503, "database_away")
            assert response.headers["retry-after"] == "2"
            assert body["request_id"] == response.headers["x-request-id"]
            assert str(engine.url.database) not in response.text, "the answer tells how the database is reached"
    assert client.get(JOBS).status_code == 200


def test_a_database_that_goes_in_the_midst_of_a_request(served: tuple[TestClient, Engine], postgres_url: str) -> None:
    client, engine = served

    def end_connection(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "FROM selection_jobs" in statement:
            with psycopg.connect(postgres_url, autocommit=True) as server:
                server.execute("SELECT pg_terminate_backend(%s, 10000)", [cursor.connection.info.backend_pid])

    event.listen(engine, "before_cursor_execute", end_connection)
    problem(client.get(JOBS), 503, "database_away")
    event.remove(engine, "before_cursor_execute", end_connection)
    assert client.get(JOBS).status_code == 200


CALLS = (
    ("GET", JOBS, None),
    ("GET", f"{JOBS}?limit=101", None),
    ("POST", JOBS, b"{}"),
    ("POST", "/v1/datasets?name=pool", b'{"text": "t"}'),
)


def busy(client: TestClient) -> None:
    for method, path, sent in CALLS:
        response = client.request(method, path, content=sent)
        problem(response, 503, "busy")
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-should-retry"] == "true"


def test_a_pool_that_is_exhausted_is_busy_and_not_away(
    served: tuple[TestClient, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, engine = served
    monkeypatch.setattr(engine.pool, "_timeout", 0.1)
    with engine.connect(), engine.connect():  # all that a pool of one, and one more, may have
        busy(client)
    assert client.get(JOBS).status_code == 200


def test_where_no_connection_becomes_free_the_service_is_busy(
    served: tuple[TestClient, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = served
    monkeypatch.setattr("service.db.engine._CONNECTION_WAIT_SECONDS", 0.1)
    connections = client.app.state.shares.connections
    with holding(connections, "one"), holding(connections, "another"):
        busy(client)
    assert client.get(JOBS).status_code == 200


def test_a_fault_of_ours_is_not_called_a_database_that_is_away(served: tuple[TestClient, Engine]) -> None:
    client, engine = served
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE selection_jobs RENAME TO elsewhere"))
    problem(client.get(JOBS), 500, "internal_error")


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [
        (errno.ENOSPC, 503, "storage_full"),
        (errno.EDQUOT, 503, "storage_full"),
        (errno.EIO, 500, "internal_error"),
    ],
)
def test_a_store_without_room_keeps_nothing_of_an_upload(
    api: World, monkeypatch: pytest.MonkeyPatch, number: int, status: int, code: str
) -> None:
    """A full disk cannot be had without being root: the store raises what it would."""
    rows = json.dumps({"text": new_id("t")}).encode()

    @contextmanager
    def writing(self: ArtifactStore, key: str) -> Iterator[Path]:
        raise OSError(number, os.strerror(number), key)
        yield

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactStore, "writing", writing)
        response = api.client.post("/v1/datasets", params={"name": "pool"}, content=rows)
    problem(response, status, code)
    if status == 503:
        assert response.headers["retry-after"] == "60"
    assert api.client.get("/v1/datasets").json()["data"] == []
    assert api.client.post("/v1/datasets", params={"name": "pool"}, content=rows).status_code == 201


def test_a_store_that_has_lost_its_files_is_not_a_fault_of_ours(api: World) -> None:
    rows = json.dumps({"text": new_id("t")}).encode()
    dataset = api.client.post("/v1/datasets", params={"name": "pool"}, content=rows).json()["id"]
    shutil.rmtree(api.store.root)
    problem(api.client.get(f"/v1/datasets/{dataset}/rows"), 410, "files_missing")
