"""The pages, over one application in this process, with two new tenants for each test."""

from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from support.job_requests import WHOLE
from support.world import World, make_settings, register_model

from service.auth.principal import Scope


@pytest.fixture(scope="module")
def app(postgres_url: str, broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    settings = make_settings(postgres_url, tmp_path_factory.mktemp("web"), broker_url=broker_url)
    register_model(settings, **WHOLE)
    with World.made(settings) as world:
        yield world.app


@pytest.fixture
def world(app: FastAPI) -> World:
    return World.of(app, scopes=Scope)
