"""What the tests of webhooks stand on: a ledger, an API over it, an endpoint that is real, and a sender."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from ledger_world import LedgerWorld, ledger_world, wait_until
from pydantic import SecretStr
from sqlalchemy import text
from standardwebhooks import Webhook
from webhook_receiver import Received, Receiver, receiving

from service.app import create_app
from service.settings import (
    ApiSettings,
    ArtifactSettings,
    BrokerSettings,
    DatabaseSettings,
    ModelSettings,
    WebhookSettings,
)
from service.tenants.service import create_key
from service.tenants.tables import Tenant
from service.webhooks.connect import Outbound
from service.webhooks.sender import Sender

SECRET = "webhook-tests-only-0123456789abcdef"
PATIENCE = 60.0
WEBHOOKS = "/v1/webhooks"
Json = dict[str, Any]


@dataclass(frozen=True)
class World:
    """`client` sends a key of the ledger's tenant, `other` one of another."""

    ledger: LedgerWorld
    app: FastAPI
    client: TestClient
    other: TestClient
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
        sender = Sender(self.app.state.settings, self.app.state.sealer, outbound or self.app.state.outbound)
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
def webhook_world(postgres_url: str, folder: Path) -> Iterator[World]:
    with ledger_world(postgres_url) as ledger, receiving(folder) as receiver:
        settings = ApiSettings(
            database=DatabaseSettings(url=ledger.url, pool_size=2),
            broker=BrokerSettings(url="redis://127.0.0.1:1/0"),
            artifacts=ArtifactSettings(url=str(folder / "store")),
            models=ModelSettings(folder=folder),
            secret_key=SecretStr(SECRET),
            webhooks=WebhookSettings(
                allowed_networks=(ip_network("127.0.0.0/8"),), ca_file=receiver.ca_file, timeout_seconds=PATIENCE
            ),
        )
        app = create_app(settings)
        with app.state.sessions.begin() as session:
            owner = session.get_one(Tenant, ledger.owner["tenant_id"]).name
            keys = [create_key(session, tenant_name=name, key_name="k", secret_key=SECRET) for name in (owner, "other")]
        client, other = (TestClient(app, headers={"Authorization": f"Bearer {key}"}) for key in keys)
        yield World(ledger, app, client, other, receiver)
        app.state.engine.dispose()
        app.state.metrics.close()
        client.close()
        other.close()


def outbound_of(world: World, **settings: Any) -> Outbound:
    return Outbound(world.app.state.settings.webhooks.model_copy(update=settings))
