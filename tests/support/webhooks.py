"""What the tests of webhooks stand on: a ledger, an API over it, an endpoint that is real, and a sender."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from sqlalchemy import text
from standardwebhooks import Webhook

from service.auth.tables import Tenant
from service.background.webhook_sender import Sender
from service.settings import WebhookSettings
from service.webhooks.safe_http import Answer, Outbound, Undelivered
from support.ledger_world import LedgerWorld, ledger_world, wait_until
from support.webhook_receiver import Received, Receiver, receiving
from support.world import Json, World, make_settings

PATIENCE = 60.0
WEBHOOKS = "/v1/webhooks"


@dataclass(frozen=True)
class WebhookWorld(World):
    """`client` sends a key of the ledger's tenant."""

    ledger: LedgerWorld
    receiver: Receiver

    def empty(self) -> None:
        self.ledger.empty()
        self.receiver.forget()
        with self.ledger.engine.begin() as connection:
            connection.execute(text("TRUNCATE webhook_endpoints, webhook_deliveries, webhook_attempts"))

    def create(self, **fields: Any) -> Json:
        """A webhook, with its secret."""
        response = self.client.post(WEBHOOKS, json={"url": self.receiver.url, **fields})
        assert response.status_code == 201, response.text
        return response.json()  # type: ignore[no-any-return]

    def test(self, webhook: Json) -> str:
        response = self.client.post(f"{WEBHOOKS}/{webhook['id']}/test")
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def deliveries(self, webhook: Json, **query: Any) -> list[Json]:
        """Newest first."""
        response = self.client.get(f"{WEBHOOKS}/{webhook['id']}/deliveries", params=query)
        assert response.status_code == 200, response.text
        return response.json()["data"]  # type: ignore[no-any-return]

    def delivery(self, webhook: Json, delivery_id: str) -> Json:
        response = self.client.get(f"{WEBHOOKS}/{webhook['id']}/deliveries/{delivery_id}")
        assert response.status_code == 200, response.text
        return response.json()  # type: ignore[no-any-return]

    def wait_for_attempts(self, webhook: Json, delivery_id: str, count: int) -> Json:
        """The delivery once that many attempts are in its log."""
        wait_until(lambda: len(self.delivery(webhook, delivery_id)["log"]) == count, PATIENCE, f"{count} attempts")
        return self.delivery(webhook, delivery_id)

    def make_due(self, delivery_id: str) -> None:
        """As time does."""
        with self.ledger.engine.begin() as connection:
            due = text("UPDATE webhook_deliveries SET next_attempt_at = now() WHERE id = :id AND state = 'pending'")
            assert connection.execute(due, {"id": delivery_id}).rowcount == 1
            connection.execute(text("NOTIFY winnow_webhooks"))

    def seconds_until_due(self, delivery_id: str) -> float:
        with self.ledger.engine.connect() as connection:
            left = text(
                "SELECT extract(epoch FROM next_attempt_at - (SELECT max(created_at) FROM webhook_attempts"
                " WHERE delivery_id = d.id)) FROM webhook_deliveries d WHERE id = :id"
            )
            return float(connection.scalar(left, {"id": delivery_id}) or 0)

    @contextmanager
    def sending(self, outbound: Any = None) -> Iterator[Sender]:
        sender = Sender(self.app.state.settings, self.app.state.encryptor, outbound or self.app.state.outbound)
        sender.start()
        try:
            yield sender
        finally:
            sender.stop()
            assert not sender._thread.is_alive()


def verified(secret: str, received: Received) -> Json:
    """The message, if its signature is good; by the library that a receiver would use."""
    return Webhook(secret).verify(received.body, received.headers)  # type: ignore[no-any-return]


@contextmanager
def webhook_world(postgres_url: str, folder: Path) -> Iterator[WebhookWorld]:
    with ledger_world(postgres_url) as ledger, receiving(folder) as receiver:
        loopback = (ip_network("127.0.0.0/8"),)
        webhooks = WebhookSettings(allowed_networks=loopback, ca_file=receiver.ca_file, timeout_seconds=PATIENCE)
        with ledger.sessions() as session:
            owner = session.get_one(Tenant, ledger.owner["tenant_id"]).name
        settings = make_settings(ledger.url, folder, webhooks=webhooks)
        with World.made(settings, tenants=(owner, "other")) as made:
            yield WebhookWorld(made.app, made.client, made.other, ledger, receiver)


def outbound_of(world: WebhookWorld, **settings: Any) -> Outbound:
    return Outbound(world.app.state.settings.webhooks.model_copy(update=settings))


class SlowOutbound:
    """An outbound that hangs on endpoints with `slow` until `go_on` is set, and counts the requests in progress."""

    def __init__(self, slow: str) -> None:
        self.slow, self.go_on, self.sent, self.hanging = slow, threading.Event(), [], 0
        self.lock = threading.Lock()

    def post(self, url: str, headers: Any, body: bytes) -> Answer:
        if self.slow in url:
            with self.lock:
                self.hanging += 1
            assert self.go_on.wait(PATIENCE)
            raise Undelivered("no answer")
        self.sent.append(headers["webhook-id"])
        return Answer(200, None)
