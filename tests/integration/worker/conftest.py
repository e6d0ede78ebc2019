from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import Process
from support.servers import Servers
from support.worker_jobs import Datasets, SharedWorker, computing_world
from support.world import World


@pytest.fixture(scope="module")
def world(servers: Servers, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[World]:
    with computing_world(servers, tmp_path_factory.mktemp("world"), tiny_llama) as made:
        yield made


@pytest.fixture(scope="module")
def datasets(world: World) -> Datasets:
    return Datasets(world)


@pytest.fixture(scope="module")
def shared(world: World) -> Iterator[SharedWorker]:
    started = SharedWorker(world)
    yield started
    started.stop()


@pytest.fixture
def worker(shared: SharedWorker) -> Process:
    return shared.running()
