"""One application with three models, and for each test two new tenants."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import select, text
from support.job_requests import URL, WHOLE, posted, set_status, upload
from support.world import World, make_settings, register_model

from service import ledger
from service.ledger import claims
from service.ledger.tables import JobUnit


@pytest.fixture(scope="module")
def app(postgres_url: str, broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    folder = tmp_path_factory.mktemp("jobs")
    settings = make_settings(postgres_url, folder, broker_url=broker_url)
    register_model(settings)
    register_model(settings, "bert", model_type="bert", num_hidden_layers=12)
    register_model(settings, "whole", **WHOLE)
    with World.made(settings) as world:
        yield world.app


@pytest.fixture
def api(app: FastAPI) -> World:
    """Two new tenants of one application."""
    return World.of(app)


@pytest.fixture
def body(api: World) -> dict[str, Any]:
    """A request that is accepted."""
    return {"model": "small", "pool": upload(api.client), "target": upload(api.client, 4), "budget": 5}


@pytest.fixture
def no_workers(api: World) -> Iterator[None]:
    """The table of workers is one for all tenants."""
    with api.engine.begin() as connection:
        connection.execute(text("DELETE FROM workers"))
    yield
    with api.engine.begin() as connection:
        connection.execute(text("DELETE FROM workers"))


@pytest.fixture
def running(api: World, body: dict[str, Any]) -> Iterator[tuple[str, ledger.Claim]]:
    """A job whose first unit is at work. The ledger of this database is shared, so the unit is claimed by its id."""
    job_id = posted(api.client, body)["id"]
    with api.sessions.begin() as session:
        unit_id = session.scalars(select(JobUnit.id).where(JobUnit.job_id == job_id)).one()
        claim = claims.take(session, unit_id, "w", 600)
        assert claim is not None
    set_status(api, job_id, "running")
    yield job_id, claim
    api.client.post(f"{URL}/{job_id}/cancel")
