"""Alive and ready: the answers when the database, its migrations or the broker are not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from fastapi.testclient import TestClient
from sqlalchemy import text
from support.ledger_world import new_database
from support.world import make_settings

from service.app import create_app
from service.db.migrate import alembic_config

NOWHERE = "127.0.0.1:1"


@contextmanager
def api(database: str, broker: str) -> Iterator[TestClient]:
    """Without the dispatcher: health does not depend on it."""
    nowhere = Path("/nonexistent")
    app = create_app(
        make_settings(
            database,
            nowhere,
            broker_url=broker,
            pool_size=1,
            artifacts={"url": "memory://health"},
            models={"folder": nowhere},
        )
    )
    yield TestClient(app)
    app.state.engine.dispose()


@pytest.fixture(scope="module")
def own_database(postgres_url: str) -> Iterator[str]:
    """Not paired with the store of another test."""
    with new_database(postgres_url) as url:
        yield url


def not_ready(client: TestClient) -> dict[str, Any]:
    response = client.get("/readyz")
    assert response.status_code == 503, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "not_ready"
    return {error["param"]: error["message"] for error in response.json()["errors"]}


def test_ready_when_every_part_is_there_and_no_key_is_needed(own_database: str, broker_url: str) -> None:
    with api(own_database, broker_url) as client:
        for path in ("/readyz", "/healthz"):
            response = client.get(path)
            assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_alive_though_no_part_is_there() -> None:
    with api(f"postgresql://nobody@{NOWHERE}/none", f"redis://{NOWHERE}/0") as client:
        assert client.get("/healthz").status_code == 200


def test_each_part_that_is_away_is_named(own_database: str, broker_url: str) -> None:
    database, broker = f"postgresql://nobody:hunter2@{NOWHERE}/none", f"redis://:hunter2@{NOWHERE}/0"
    with api(database, broker_url) as client:
        assert not_ready(client).keys() == {"database"}
    with api(own_database, broker) as client:
        assert not_ready(client).keys() == {"broker"}
    with api(database, broker) as client:
        wrong = not_ready(client)
        assert wrong.keys() == {"database", "broker"}
        assert not any(word in str(wrong) for word in ("hunter2", "127.0.0.1", "nobody")), "anyone may read the answer"


@pytest.mark.parametrize("migrated", [False, True], ids=["never migrated", "taken down again"])
def test_a_database_without_the_newest_migration_is_not_ready(
    postgres_url: str, broker_url: str, migrated: bool
) -> None:
    with new_database(postgres_url, migrated=migrated) as url, api(url, broker_url) as client:
        if migrated:
            assert client.get("/readyz").status_code == 200
            command.downgrade(alembic_config(url), "base")
        wrong = not_ready(client)
        assert wrong.keys() == {"migrations"}
        assert "winnow migrate" in wrong["migrations"]
        if migrated:
            command.upgrade(alembic_config(url), "head")
            assert client.get("/readyz").status_code == 200


def test_a_database_of_a_later_version_is_ready(postgres_url: str, broker_url: str) -> None:
    """During an upgrade the API of this version serves on, on the schema of the next one."""
    with new_database(postgres_url) as url, api(url, broker_url) as client:
        with client.app.state.engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        assert client.get("/readyz").status_code == 200
