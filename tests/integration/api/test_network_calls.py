"""No call to another server within a database transaction, which would keep its locks and its connection for as long as the other
takes: over every route, and in what runs beside them."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import huggingface_hub.constants
import pytest
from support import preset_rows
from support.api_walk import Walk
from support.dataset_hub import DatasetHub
from support.hub import Hub
from support.jobs import HandmadeJobs
from support.servers import Servers
from support.watches import TransactionWatch
from support.world import own_settings, register_model, serving

from service.auth.principal import Scope
from service.datasets.presets import PRESETS

# The lock of a content, which keeps its files from being removed while another dataset begins to use them, is a transaction's.
UNDER_THE_LOCK_OF_A_CONTENT = {
    "store.writing in service/datasets/storage.py _move",
    "store.delete in service/datasets/service.py remove_unused_files",
}


@pytest.fixture
def endpoint() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield patch


def test_no_call_to_another_server_within_a_transaction(
    servers: Servers, tmp_path: Path, endpoint: pytest.MonkeyPatch
) -> None:
    preset = PRESETS["gsm8k"]
    with (
        Hub.running() as models,
        DatasetHub.running() as datasets,
        own_settings(
            servers,
            tmp_path,
            models={"folder": tmp_path, "hub": ["org/*"]},
            datasets={"hub": [preset.hub.id]},
            webhooks={"allowed_networks": ["127.0.0.0/8"]},
        ) as settings,
        HandmadeJobs.made(settings, scopes=Scope) as world,
    ):
        register_model(settings)
        datasets.put(preset.hub.id, preset_rows.repository("gsm8k", preset_rows.rows("gsm8k", 60)))
        watch = TransactionWatch()
        with (
            watch.watching(),
            serving(watch.around(world.app), runs=True) as url,
            httpx.Client(base_url=url, headers=world.client.headers, timeout=60) as client,
        ):
            walk = Walk(world, client)
            walk.all("small")
            endpoint.setattr(huggingface_hub.constants, "ENDPOINT", models.url)
            endpoint.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", models.url + "/{repo_id}")
            walk.jobs("org/model")
            endpoint.setattr(huggingface_hub.constants, "ENDPOINT", datasets.url)
            walk.jobs("small", {"preset": "gsm8k", "count": 12})
            walk.imported(preset.hub.id)
    assert models.asked != []
    assert datasets.tokens != {}
    assert walk.missing() == set()
    assert watch.transactions > 100
    assert watch.calls > 20
    assert {re.sub(r":\d+", "", found) for found in watch.found} == UNDER_THE_LOCK_OF_A_CONTENT
