"""What can be done with webhooks. Callers commit."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy.orm import Session

from service.audit import service as audit
from service.errors import Conflict, NotFound, Unprocessable
from service.ids import new_id
from service.sealing import Sealer
from service.tenants.caller import Caller
from service.webhooks import repository, signature
from service.webhooks.connect import Outbound, Refused, parse
from service.webhooks.schemas import WebhookChange, WebhookRequest
from service.webhooks.tables import WebhookAttempt, WebhookDelivery, WebhookEndpoint

MOST_ENDPOINTS = 10
ROTATION = timedelta(hours=24)


def create(
    session: Session, caller: Caller, request: WebhookRequest, outbound: Outbound, sealer: Sealer
) -> tuple[WebhookEndpoint, str]:
    """The endpoint and its secret, which is shown nowhere again.

    Raises:
        Unprocessable: the URL leads to nothing that we send to.
        Conflict: the tenant has as many as it may.
    """
    _check(outbound, request.url)
    repository.lock_tenant(session, caller.tenant_id)
    if repository.count(session, caller.tenant_id) >= MOST_ENDPOINTS:
        raise Conflict(
            f"There are {MOST_ENDPOINTS} webhooks already, the most there may be; delete one first.",
            code="too_many_webhooks",
        )
    secret = signature.new_secret()
    endpoint = WebhookEndpoint(
        id=new_id("whk"),
        tenant_id=caller.tenant_id,
        url=request.url,
        description=request.description,
        events=[event.value for event in request.events],
        sealed_secret=sealer.seal(secret),
    )
    session.add(endpoint)
    session.flush()
    session.refresh(endpoint)
    # Of a URL only the host: the rest may be a secret of the receiver.
    audit.record(session, caller, "webhook.created", endpoint.id, host=parse(request.url).host, events=endpoint.events)
    return endpoint, signature.shown(secret)


def find(session: Session, tenant_id: str, endpoint_id: str, *, lock: bool = False) -> WebhookEndpoint:
    """The endpoint.

    Raises:
        NotFound: the tenant has none of this id.
    """
    endpoint = repository.get(session, tenant_id, endpoint_id, lock=lock)
    if endpoint is None:
        raise NotFound("There is no such webhook; see GET /v1/webhooks.")
    return endpoint


def page(session: Session, tenant_id: str, *, after: str | None, limit: int) -> tuple[Sequence[WebhookEndpoint], bool]:
    """A page of endpoints, newest first, and whether there are more."""
    found = repository.page(session, tenant_id, after=after, limit=limit + 1)
    return found[:limit], len(found) > limit


def change(
    session: Session, caller: Caller, endpoint_id: str, asked: WebhookChange, outbound: Outbound
) -> WebhookEndpoint:
    """Changes what is given. What was not delivered yet goes to the new URL; disabling fails it.

    Raises:
        NotFound: there is none of this id.
        Unprocessable: the URL leads to nothing that we send to.
    """
    find(session, caller.tenant_id, endpoint_id)
    if asked.url is not None:
        _check(outbound, asked.url)
    endpoint = find(session, caller.tenant_id, endpoint_id, lock=True)
    given = asked.model_dump(mode="json", exclude_none=True)
    for name in given.keys() - {"enabled"}:
        setattr(endpoint, name, given[name])
    if asked.enabled:
        endpoint.disabled_at = endpoint.disabled_reason = None
    elif asked.enabled is False and endpoint.disabled_at is None:
        endpoint.disabled_at, endpoint.disabled_reason = repository.now(session), "disabled by its owner"
        repository.fail_unwanted(session, endpoint.id)
    if asked.url is not None:
        given["url"] = parse(asked.url).host
    given.pop("description", None)
    audit.record(session, caller, "webhook.updated", endpoint.id, **given)
    return endpoint


def delete(session: Session, caller: Caller, endpoint_id: str) -> None:
    """Raises NotFound where there is none of this id."""
    endpoint = find(session, caller.tenant_id, endpoint_id, lock=True)
    endpoint.deleted_at = repository.now(session)
    repository.fail_unwanted(session, endpoint.id)
    audit.record(session, caller, "webhook.deleted", endpoint.id)


def rotate(session: Session, caller: Caller, endpoint_id: str, sealer: Sealer) -> tuple[WebhookEndpoint, str]:
    """A new secret; that of now signs beside it for 24 hours, the one before it no longer.

    Raises:
        NotFound: there is none of this id.
    """
    endpoint = find(session, caller.tenant_id, endpoint_id, lock=True)
    secret = signature.new_secret()
    endpoint.sealed_previous_secret = endpoint.sealed_secret
    endpoint.previous_secret_until = repository.now(session) + ROTATION
    endpoint.sealed_secret = sealer.seal(secret)
    audit.record(session, caller, "webhook.secret_rotated", endpoint.id)
    return endpoint, signature.shown(secret)


def test(session: Session, caller: Caller, endpoint_id: str) -> WebhookDelivery:
    """An event of the type `webhook.test`, delivered as any other.

    Raises:
        NotFound: there is none of this id.
        Conflict: it is disabled.
    """
    endpoint = _enabled(session, caller, endpoint_id)
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
    audit.record(session, caller, "webhook.tested", endpoint.id, delivery=delivery.id)
    return delivery


def deliveries(
    session: Session, tenant_id: str, endpoint_id: str, *, after: str | None, state: str | None, limit: int
) -> tuple[Sequence[WebhookDelivery], bool]:
    """A page of deliveries, newest first, and whether there are more.

    Raises:
        NotFound: there is no endpoint of this id.
    """
    endpoint = find(session, tenant_id, endpoint_id)
    found = repository.deliveries(session, endpoint.id, after=after, state=state, limit=limit + 1)
    return found[:limit], len(found) > limit


def delivery(
    session: Session, tenant_id: str, endpoint_id: str, delivery_id: str
) -> tuple[WebhookDelivery, Sequence[WebhookAttempt]]:
    """A delivery and its attempts, oldest first.

    Raises:
        NotFound: there is none of these ids.
    """
    found = repository.get_delivery(session, find(session, tenant_id, endpoint_id).id, delivery_id)
    if found is None:
        raise _no_delivery()
    return found, repository.attempts(session, found.id)


def replay(session: Session, caller: Caller, endpoint_id: str, delivery_id: str) -> WebhookDelivery:
    """Sends a delivery again, from the first attempt on; one that waits for its next attempt is sent now.

    It is the same row, set back, and no new one: the message's id is the row's, and a message that is sent again keeps its id, so
    that a receiver which has it may pass over it. Its log goes on. Where an attempt is under way, both may arrive.

    Raises:
        NotFound: there is none of these ids.
        Conflict: the endpoint is disabled.
    """
    endpoint = _enabled(session, caller, endpoint_id)
    found = repository.get_delivery(session, endpoint.id, delivery_id, lock=True)
    if found is None:
        raise _no_delivery()
    now = repository.now(session)
    found.state, found.attempts, found.next_attempt_at, found.finished_at = "pending", 0, now, None
    session.flush()
    repository.notify(session)
    audit.record(session, caller, "webhook.replayed", endpoint.id, delivery=found.id)
    return found


def _enabled(session: Session, caller: Caller, endpoint_id: str) -> WebhookEndpoint:
    endpoint = find(session, caller.tenant_id, endpoint_id, lock=True)
    if endpoint.disabled_at is not None:
        raise Conflict(
            f"The webhook is disabled ({endpoint.disabled_reason}); enable it first.", code="webhook_disabled"
        )
    return endpoint


def _check(outbound: Outbound, url: str) -> None:
    try:
        outbound.check(url)
    except Refused as error:
        raise Unprocessable(f"url: {error}.", param="url") from error


def _no_delivery() -> NotFound:
    return NotFound("There is no such delivery; see GET /v1/webhooks/{id}/deliveries. They are kept for 30 days.")
