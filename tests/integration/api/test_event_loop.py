"""No call blocks the event loop, on which all requests of a process go on."""

from pathlib import Path

import httpx
from support.api_walk import Walk
from support.jobs import HandmadeJobs
from support.servers import Servers
from support.watches import LoopWatch
from support.world import own_settings, register_model, serving

from service.auth.principal import Scope


def test_no_call_blocks_the_event_loop(servers: Servers, tmp_path: Path) -> None:
    with (
        own_settings(servers, tmp_path, webhooks={"allowed_networks": ["127.0.0.0/8"]}) as settings,
        HandmadeJobs.made(settings, scopes=Scope) as world,
    ):
        register_model(settings)
        watch = LoopWatch(world.app)
        with (
            serving(watch, runs=True) as url,
            httpx.Client(base_url=url, headers=world.client.headers, timeout=60) as client,
        ):
            client.get("/healthz")
            walk = Walk(world, client)
            with watch.watching():
                walk.all("small")
    assert walk.missing() == set()
    assert watch.requests > 60
    assert watch.found == set()
