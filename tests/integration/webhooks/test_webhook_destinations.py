"""Where deliveries may not go, end to end: from the API that registers an endpoint to the sender that meets it changed."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_network

import pytest
from support.webhook_receiver import NAME, status
from support.webhooks import WebhookWorld

from service.webhooks.safe_http import Outbound


@contextmanager
def internal_service(port: int) -> Iterator[Callable[[], bool]]:
    """Something that listens where no delivery may go; the call says whether anybody came."""
    with socket.create_server(("127.0.0.2", port)) as server:
        server.setblocking(False)

        def was_reached() -> bool:
            with suppress(BlockingIOError):
                server.accept()[0].close()
                return True
            return False

        yield was_reached


def test_a_name_that_turns_to_an_internal_address_after_the_check_is_not_followed(
    world: WebhookWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered and tested while its name leads to an allowed address, which it does again in the end."""
    addresses = ["127.0.0.1"]
    settings = world.app.state.settings.webhooks.model_copy(update={"allowed_networks": (ip_network("127.0.0.1/32"),)})
    monkeypatch.setitem(world.app.state._state, "outbound", Outbound(settings, lambda *_: addresses))
    webhook = world.create(url=f"https://{NAME}:{world.receiver.port}/hook")
    with internal_service(world.receiver.port) as was_reached, world.sending():
        world.wait_for_attempts(webhook, first := world.test(webhook), 1)
        for turned in (["127.0.0.2"], ["127.0.0.1", "127.0.0.2"], ["::ffff:127.0.0.2"]):
            addresses[:] = turned
            world.ledger.cancel(world.ledger.job())
            delivery = world.wait_for_attempts(webhook, world.deliveries(webhook)[0]["id"], 1)
            assert (delivery["state"], delivery["log"][0]["status"]) == ("pending", None)
            assert "127.0.0" not in delivery["log"][0]["error"]
        assert not was_reached()
        assert [request.headers["webhook-id"] for request in world.receiver.requests] == [first]
        addresses[:] = ["127.0.0.1"]
        world.make_due(delivery["id"])
        assert world.wait_for_attempts(webhook, delivery["id"], 2)["state"] == "delivered"
    assert len(world.receiver.requests) == 2


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_told_and_never_followed(world: WebhookWorld, code: int) -> None:
    webhook = world.create()
    with internal_service(world.receiver.port) as was_reached, world.sending():
        internal = f"https://127.0.0.2:{world.receiver.port}/latest/meta-data"
        world.receiver.answer = status(code, Location=internal)
        delivery = world.wait_for_attempts(webhook, world.test(webhook), 1)
        assert (delivery["log"][0]["status"], delivery["state"]) == (code, "pending")
        assert internal not in json.dumps(delivery["log"])
        assert not was_reached()
    assert len(world.receiver.requests) == 1
