"""Alive and ready: what is told when the database, its migrations or the broker are not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from conftest import SECRET
from fastapi.testclient import TestClient
from ledger_world import new_database
from pydantic import SecretStr
from sqlalchemy import text

from service.app import create_app
from service.schema import alembic_config
from service.settings import ApiSettings, ArtifactSettings, BrokerSettings, DatabaseSettings, ModelSettings

NOWHERE = "127.0.0.1:1"


@contextmanager
def api(database: str, broker: str) -> Iterator[TestClient]:
    """Without the dispatcher: health does not depend on it."""
    app = create_app(
        ApiSettings(
            database=DatabaseSettings(url=database, pool_size=1),
            broker=BrokerSettings(url=broker),
            artifacts=ArtifactSettings(url="memory://health"),
            models=ModelSettings(folder=Path("/nonexistent")),
            secret_key=SecretStr(SECRET),
        )
    )
    yield TestClient(app)
    app.state.engine.dispose()


def not_ready(client: TestClient) -> dict[str, Any]:
    response = client.get("/readyz")
    assert response.status_code == 503, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "not_ready"
    return {error["param"]: error["message"] for error in response.json()["errors"]}


def test_ready_when_every_part_is_there_and_no_key_is_needed(postgres_url: str, broker_url: str) -> None:
    with api(postgres_url, broker_url) as client:
        for path in ("/readyz", "/healthz"):
            response = client.get(path)
            assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_alive_though_no_part_is_there() -> None:
    with api(f"postgresql://nobody@{NOWHERE}/none", f"redis://{NOWHERE}/0") as client:
        assert client.get("/healthz").status_code == 200


def test_each_part_that_is_away_is_named(postgres_url: str, broker_url: str) -> None:
    database, broker = f"postgresql://nobody:hunter2@{NOWHERE}/none", f"redis://:hunter2@{NOWHERE}/0"
    with api(database, broker_url) as client:
        assert not_ready(client).keys() == {"database"}
    with api(postgres_url, broker) as client:
        assert not_ready(client).keys() == {"broker"}
    with api(database, broker) as client:
        wrong = not_ready(client)
        assert wrong.keys() == {"database", "broker"}
        assert "hunter2" not in str(wrong), "the answer shows a password to everyone"


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


def test_a_database_of_a_later_version_is_ready_and_one_of_an_earlier_is_not(
    postgres_url: str, broker_url: str
) -> None:
    """During an upgrade the API of this version serves on, on the schema of the next one."""
    with new_database(postgres_url) as url, api(url, broker_url) as client:
        command.downgrade(alembic_config(url), "-1")
        assert not_ready(client).keys() == {"migrations"}
        with client.app.state.engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        assert client.get("/readyz").status_code == 200
