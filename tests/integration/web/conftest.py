"""The pages, over the API in this process."""

from collections.abc import Iterator

import pytest
from support.world import World

from service.auth.principal import Scope
from service.settings import ApiSettings


@pytest.fixture
def world(settings: ApiSettings) -> Iterator[World]:
    with World.made(settings, scopes=Scope) as world:
        yield world
