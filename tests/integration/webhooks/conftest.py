"""One service with webhooks and a receiver for the tests of a file; each test starts with neither endpoints nor messages."""

from collections.abc import Iterator

import pytest
from support.webhooks import WebhookWorld, webhook_world


@pytest.fixture(scope="module")
def _world(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebhookWorld]:
    with webhook_world(postgres_url, tmp_path_factory.mktemp("webhooks")) as world:
        yield world


@pytest.fixture
def world(_world: WebhookWorld) -> WebhookWorld:
    _world.empty()
    return _world
