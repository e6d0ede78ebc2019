"""The API over a real PostgreSQL and a real broker, with two tenants."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.servers import Servers
from support.world import World, make_settings

from service.db.migrate import upgrade
from service.settings import ApiSettings


@pytest.fixture(scope="session")
def postgres_url(servers: Servers) -> str:
    """A database that all tests share which need no other; each has tenants of its own."""
    upgrade(servers.postgres.url)
    return servers.postgres.url


@pytest.fixture(scope="session")
def broker_url(servers: Servers) -> str:
    return servers.broker.url


@pytest.fixture
def settings(postgres_url: str, broker_url: str, tmp_path: Path) -> ApiSettings:
    return make_settings(postgres_url, tmp_path, broker_url=broker_url, models={"folder": tmp_path})


@pytest.fixture
def api(settings: ApiSettings) -> Iterator[World]:
    with World.made(settings, runs=True) as world:
        yield world
