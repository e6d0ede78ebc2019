"""What can be done with webhooks. Callers commit."""

import base64
import json
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy.orm import Session

from service.audit import service as audit
from service.auth.principal import Principal
from service.db.locks import advisory_lock
from service.http.errors import Conflict, NotFound, Unprocessable
from service.ids import new_id
from service.storage.encryption import Encryptor
from service.webhooks import repository
from service.webhooks.safe_http import Outbound, Refused, parse
from service.webhooks.schemas import WebhookChange, WebhookRequest
from service.webhooks.tables import WebhookAttempt, WebhookDelivery, WebhookEndpoint

MAX_ENDPOINTS = 10
ROTATION = timedelta(hours=24)


def check_url(outbound: Outbound, url: str) -> None:
    """Resolves the URL, which may take seconds: call it while no transaction is open.

    Raises:
        Unprocessable: deliveries are not sent there.
    """
    try:
        outbound.check(url)
    except Refused as error:
        raise Unprocessable(f"url: {error}.", param="url") from error


def create(
    session: Session, principal: Principal, request: WebhookRequest, encryptor: Encryptor
) -> tuple[WebhookEndpoint, str]:
    """The endpoint and its secret, which is never shown later; call `check_url` first.

    Raises:
        Conflict: the tenant has the maximum number.
    """
    advisory_lock(session, f"webhooks/{principal.tenant_id}")  # their number is bounded
    if repository.count(session, principal.tenant_id) >= MAX_ENDPOINTS:
        raise Conflict(
            f"You already have {MAX_ENDPOINTS} webhooks, the maximum; delete one first.",
            code="too_many_webhooks",
        )
    secret = secrets.token_bytes(32)
    endpoint = WebhookEndpoint(
        id=new_id("whk"),
        tenant_id=principal.tenant_id,
        url=request.url,
        description=request.description,
        events=[event.value for event in request.events],
        sealed_secret=encryptor.encrypt(secret),
    )
    session.add(endpoint)
    session.flush()
    session.refresh(endpoint)
    # Of a URL only the host: the rest may be a secret of the receiver.
    audit.record(
        session, principal, "webhook.created", endpoint.id, host=parse(request.url).host, events=endpoint.events
    )
    return endpoint, _encoded(secret)


def _encoded(secret: bytes) -> str:
    """The form that Standard Webhooks libraries accept."""
    return f"whsec_{base64.b64encode(secret).decode()}"


def find(session: Session, tenant_id: str, endpoint_id: str, *, lock: bool = False) -> WebhookEndpoint:
    """Raises NotFound if the tenant has none with this id."""
    endpoint = repository.get(session, tenant_id, endpoint_id, lock=lock)
    if endpoint is None:
        raise NotFound("No such webhook; see GET /v1/webhooks.")
    return endpoint


def change(session: Session, principal: Principal, endpoint_id: str, changes: WebhookChange) -> WebhookEndpoint:
    """Changes the given fields; call `check_url` first. Pending messages go to a new URL, or fail if it is disabled.

    Raises:
        NotFound: there is none with this id.
    """
    endpoint = find(session, principal.tenant_id, endpoint_id, lock=True)
    given = changes.model_dump(mode="json", exclude_none=True)
    for name in given.keys() - {"enabled"}:
        setattr(endpoint, name, given[name])
    if changes.enabled:
        endpoint.disabled_at = endpoint.disabled_reason = None
    elif changes.enabled is False and endpoint.disabled_at is None:
        endpoint.disabled_at, endpoint.disabled_reason = repository.now(session), "disabled by its owner"
        repository.fail_unwanted(session, endpoint.id)
    if changes.url is not None:
        given["url"] = parse(changes.url).host
    given.pop("description", None)
    audit.record(session, principal, "webhook.updated", endpoint.id, **given)
    return endpoint


def delete(session: Session, principal: Principal, endpoint_id: str) -> None:
    """Raises NotFound if there is none with this id."""
    endpoint = find(session, principal.tenant_id, endpoint_id, lock=True)
    endpoint.deleted_at = repository.now(session)
    repository.fail_unwanted(session, endpoint.id)
    audit.record(session, principal, "webhook.deleted", endpoint.id)


def rotate(
    session: Session, principal: Principal, endpoint_id: str, encryptor: Encryptor
) -> tuple[WebhookEndpoint, str]:
    """A new secret; for 24 hours messages are signed with the current one too, but no longer with any older one.

    Raises:
        NotFound: there is none with this id.
    """
    endpoint = find(session, principal.tenant_id, endpoint_id, lock=True)
    secret = secrets.token_bytes(32)
    endpoint.sealed_previous_secret = endpoint.sealed_secret
    endpoint.previous_secret_until = repository.now(session) + ROTATION
    endpoint.sealed_secret = encryptor.encrypt(secret)
    audit.record(session, principal, "webhook.secret_rotated", endpoint.id)
    return endpoint, _encoded(secret)


def test(session: Session, principal: Principal, endpoint_id: str) -> WebhookDelivery:
    """Queues a message of the type `webhook.test`, delivered like any other.

    Raises:
        NotFound: there is none with this id.
        Conflict: it is disabled.
    """
    endpoint = _enabled(session, principal, endpoint_id)
    at = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    payload = {"type": "webhook.test", "timestamp": at, "data": {"object": "webhook", "id": endpoint.id}}
    delivery = WebhookDelivery(
        id=new_id("msg"),
        endpoint_id=endpoint.id,
        type="webhook.test",
        payload=json.dumps(payload),
        next_attempt_at=repository.now(session),
    )
    session.add(delivery)
    session.flush()
    session.refresh(delivery)
    repository.notify(session)
    audit.record(session, principal, "webhook.tested", endpoint.id, delivery=delivery.id)
    return delivery


def deliveries(
    session: Session, tenant_id: str, endpoint_id: str, *, after: str | None, state: str | None, limit: int
) -> tuple[Sequence[WebhookDelivery], bool]:
    """A page of deliveries, newest first, and whether there are more.

    Raises:
        NotFound: there is no endpoint with this id.
    """
    endpoint = find(session, tenant_id, endpoint_id)
    return repository.deliveries(session, endpoint.id, after=after, state=state, limit=limit)


def delivery(
    session: Session, tenant_id: str, endpoint_id: str, delivery_id: str
) -> tuple[WebhookDelivery, Sequence[WebhookAttempt]]:
    """A delivery and its attempts, oldest first.

    Raises:
        NotFound: there is none with these ids.
    """
    found = _delivery(session, find(session, tenant_id, endpoint_id), delivery_id)
    return found, repository.attempts(session, found.id)


def replay(session: Session, principal: Principal, endpoint_id: str, delivery_id: str) -> WebhookDelivery:
    """Restarts a delivery from the first attempt; one that waits for its next attempt is sent now.

    The row is reset, not copied: its id is the message's, which a replay keeps, so that a receiver can ignore a duplicate. Its
    log goes on. If an attempt is in progress, both may arrive.

    Raises:
        NotFound: there is none with these ids.
        Conflict: the endpoint is disabled.
    """
    endpoint = _enabled(session, principal, endpoint_id)
    found = _delivery(session, endpoint, delivery_id, lock=True)
    now = repository.now(session)
    found.state, found.attempts, found.next_attempt_at, found.finished_at = "pending", 0, now, None
    session.flush()
    repository.notify(session)
    audit.record(session, principal, "webhook.replayed", endpoint.id, delivery=found.id)
    return found


def _enabled(session: Session, principal: Principal, endpoint_id: str) -> WebhookEndpoint:
    endpoint = find(session, principal.tenant_id, endpoint_id, lock=True)
    if endpoint.disabled_at is not None:
        raise Conflict(
            f"The webhook is disabled ({endpoint.disabled_reason}); enable it first.", code="webhook_disabled"
        )
    return endpoint


def _delivery(session: Session, endpoint: WebhookEndpoint, delivery_id: str, *, lock: bool = False) -> WebhookDelivery:
    found = repository.get_delivery(session, endpoint.id, delivery_id, lock=lock)
    if found is None:
        raise NotFound("No such delivery; see GET /v1/webhooks/{id}/deliveries. Deliveries are kept for 30 days.")
    return found
