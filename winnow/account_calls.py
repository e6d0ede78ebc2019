"""The client's calls for registered models, keys, limits, webhooks and the audit log."""

from collections.abc import AsyncGenerator
from typing import Any

from winnow.answers import (
    Answer,
    AuditEntry,
    Delivery,
    DeliveryDetail,
    Key,
    NewKey,
    NewSecret,
    RegisteredModel,
    Usage,
    Webhook,
    Worker,
)
from winnow.transport import Connection
from winnow.twins import call


class _Models(Answer):
    data: list[RegisteredModel]


class AccountCalls(Connection):
    """What belongs to a tenant besides datasets and jobs."""

    @call
    async def models(self) -> list[RegisteredModel]:
        """The registered models; a job may also use one from the hub."""
        return (await self._one(_Models, "GET", "/models")).data

    @call
    def workers(self) -> AsyncGenerator[Worker]:
        """The workers, by id: state, device, and what each does for your tenant; needs a key with the scope admin."""
        return self._pages(Worker, "/workers")

    @call
    async def create_key(self, /, name: str, **request: Any) -> NewKey:
        """Makes an API key of your tenant; its `key` is shown only this once.

        Args:
            request: scopes, expires_at or expires_in_days, limits.
        """
        return await self._one(NewKey, "POST", "/keys", json={"name": name, **request})

    @call
    def keys(self) -> AsyncGenerator[Key]:
        """Your tenant's API keys, newest first, revoked ones too."""
        return self._pages(Key, "/keys")

    @call
    async def key(self, key_id: str) -> Key:
        """One of your tenant's API keys."""
        return await self._one(Key, "GET", f"/keys/{key_id}")

    @call
    async def revoke_key(self, key_id: str) -> None:
        """Revokes an API key; safe to repeat."""
        await self._call("DELETE", f"/keys/{key_id}")

    @call
    async def usage(self) -> Usage:
        """What your key has used of its limits."""
        return await self._one(Usage, "GET", "/usage")

    @call
    def audit_log(self, /, **filters: str | None) -> AsyncGenerator[AuditEntry]:
        """Who did what in the tenant, newest first; needs a key with the scope admin.

        Args:
            filters: action, object_id, key_id, created_after, created_before.
        """
        return self._pages(AuditEntry, "/audit-log", **filters)

    @call
    async def create_webhook(self, /, url: str, **request: Any) -> NewSecret:
        """Registers a URL to be notified of your jobs; its `secret`, for a Standard Webhooks library, is shown only this once.

        Args:
            request: events, description.
        """
        return await self._one(NewSecret, "POST", "/webhooks", json={"url": url, **request})

    @call
    def webhooks(self) -> AsyncGenerator[Webhook]:
        """Your tenant's webhooks, newest first."""
        return self._pages(Webhook, "/webhooks")

    @call
    async def webhook(self, webhook_id: str) -> Webhook:
        """One of your tenant's webhooks."""
        return await self._one(Webhook, "GET", f"/webhooks/{webhook_id}")

    @call
    async def change_webhook(self, /, webhook_id: str, **changes: Any) -> Webhook:
        """Changes url, events, description or enabled."""
        return await self._one(Webhook, "PATCH", f"/webhooks/{webhook_id}", json=changes)

    @call
    async def delete_webhook(self, webhook_id: str) -> None:
        """Deletes a webhook with its deliveries."""
        await self._call("DELETE", f"/webhooks/{webhook_id}")

    @call
    async def rotate_webhook_secret(self, webhook_id: str) -> NewSecret:
        """Makes a new `secret`; for 24 hours messages are also signed with the previous one."""
        return await self._one(NewSecret, "POST", f"/webhooks/{webhook_id}/rotate-secret")

    @call
    async def test_webhook(self, webhook_id: str) -> Delivery:
        """Sends a message of the type `webhook.test`; returns its delivery."""
        return await self._one(Delivery, "POST", f"/webhooks/{webhook_id}/test")

    @call
    def deliveries(self, webhook_id: str, state: str | None = None) -> AsyncGenerator[Delivery]:
        """The messages of a webhook, newest first."""
        return self._pages(Delivery, f"/webhooks/{webhook_id}/deliveries", state=state)

    @call
    async def delivery(self, webhook_id: str, delivery_id: str) -> DeliveryDetail:
        """A message with its payload and every attempt to deliver it."""
        return await self._one(DeliveryDetail, "GET", f"/webhooks/{webhook_id}/deliveries/{delivery_id}")

    @call
    async def replay(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Resends a message under the same id."""
        return await self._one(Delivery, "POST", f"/webhooks/{webhook_id}/deliveries/{delivery_id}/replay")
