"""A succeeded job of 40,000 samples, and the arrays that were published for it."""

import time
from collections.abc import Iterator
from threading import Thread

import pytest
import uvicorn
from support.results import Published, published_world
from support.world import make_settings


@pytest.fixture(scope="module")
def world(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("results")
    with published_world(make_settings(postgres_url, folder), folder) as world:
        yield world


@pytest.fixture(autouse=True)
def _no_connection_is_left(world: Published) -> Iterator[None]:
    yield
    assert world.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.fixture
def url(world: Published) -> Iterator[str]:
    """The application behind a real server, on a free port."""
    server = uvicorn.Server(uvicorn.Config(world.client.app, port=0, lifespan="off", log_level="error"))
    thread = Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
