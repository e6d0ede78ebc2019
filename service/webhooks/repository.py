"""All SQL of webhooks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, func, or_, select, text, update
from sqlalchemy.orm import Session

from service import ids
from service.webhooks.tables import WebhookAttempt, WebhookDelivery, WebhookEndpoint

CHANNEL = "winnow_webhooks"
KEPT = timedelta(days=30)


def lock_tenant(session: Session, tenant_id: str) -> None:
    """Until the transaction ends no other one creates an endpoint of the tenant."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"webhooks/{tenant_id}", 0))))


def count(session: Session, tenant_id: str) -> int:
    found = select(func.count()).where(WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None))
    return session.scalar(found) or 0


def get(session: Session, tenant_id: str, endpoint_id: str, *, lock: bool = False) -> WebhookEndpoint | None:
    """The endpoint, if it is not deleted; with `lock` nothing else changes it until the transaction ends."""
    if not ids.is_id("whk", endpoint_id):
        return None
    found = select(WebhookEndpoint).where(
        WebhookEndpoint.id == endpoint_id,
        WebhookEndpoint.tenant_id == tenant_id,
        WebhookEndpoint.deleted_at.is_(None),
    )
    # NO KEY: the trigger that writes deliveries refers to the row, and must not wait.
    return session.scalar(found.with_for_update(key_share=True) if lock else found)


def page(session: Session, tenant_id: str, *, after: str | None, limit: int) -> list[WebhookEndpoint]:
    """At most `limit`, newest first, older than `after`."""
    found = select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None))
    if after is not None:
        found = found.where(WebhookEndpoint.id < after)
    return list(session.scalars(found.order_by(WebhookEndpoint.id.desc()).limit(limit)))


def get_delivery(session: Session, endpoint_id: str, delivery_id: str, *, lock: bool = False) -> WebhookDelivery | None:
    if not ids.is_id("msg", delivery_id):
        return None
    found = select(WebhookDelivery).where(WebhookDelivery.id == delivery_id, WebhookDelivery.endpoint_id == endpoint_id)
    return session.scalar(found.with_for_update() if lock else found)


def deliveries(
    session: Session, endpoint_id: str, *, after: str | None, state: str | None, limit: int
) -> list[WebhookDelivery]:
    """At most `limit`, newest first, older than `after`."""
    found = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    if after is not None:
        found = found.where(WebhookDelivery.id < after)
    if state is not None:
        found = found.where(WebhookDelivery.state == state)
    return list(session.scalars(found.order_by(WebhookDelivery.id.desc()).limit(limit)))


def attempts(session: Session, delivery_id: str) -> Sequence[WebhookAttempt]:
    """Oldest first."""
    found = select(WebhookAttempt).where(WebhookAttempt.delivery_id == delivery_id)
    return session.scalars(found.order_by(WebhookAttempt.id)).all()


def notify(session: Session) -> None:
    """The senders look when the transaction has been committed."""
    session.execute(select(func.pg_notify(CHANNEL, "")))


def now(session: Session) -> datetime:
    found: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return found


def fail_unwanted(session: Session, endpoint_id: str | None = None) -> None:
    """What waits for an endpoint that is disabled or deleted (for this one, or any) has failed.

    Any: an event may have been written while its endpoint was being disabled.
    """
    session.flush()
    unwanted = or_(WebhookEndpoint.disabled_at.is_not(None), WebhookEndpoint.deleted_at.is_not(None))
    failed = update(WebhookDelivery).where(
        WebhookDelivery.endpoint_id == WebhookEndpoint.id, WebhookDelivery.state == "pending", unwanted
    )
    if endpoint_id is not None:
        failed = failed.where(WebhookEndpoint.id == endpoint_id)
    session.execute(
        failed.values(state="failed", next_attempt_at=None, finished_at=func.clock_timestamp()),
        execution_options={"synchronize_session": False},
    )


@dataclass(frozen=True, slots=True)
class Due:
    id: str
    endpoint_id: str
    tenant_id: str


_DUE = text("""
    SELECT d.id, e.id AS endpoint_id, e.tenant_id
    FROM webhook_endpoints e, LATERAL (
        SELECT id, next_attempt_at FROM webhook_deliveries
        WHERE endpoint_id = e.id AND state = 'pending' AND next_attempt_at <= now()
        ORDER BY next_attempt_at LIMIT :each
    ) d
    ORDER BY d.next_attempt_at
""")


def due(session: Session, *, each: int) -> list[Due]:
    """What may be sent now, what waits longest first, and at most so many of one endpoint: one with a long queue hides none."""
    return [Due(row.id, row.endpoint_id, row.tenant_id) for row in session.execute(_DUE, {"each": each})]


def claim(
    session: Session, delivery_ids: Collection[str], *, lease_seconds: float
) -> list[tuple[WebhookDelivery, WebhookEndpoint]]:
    """Takes such of them as are still due and free, each with its endpoint: until the lease ends no other process will."""
    found = (
        select(WebhookDelivery, WebhookEndpoint)
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .where(WebhookDelivery.id.in_(delivery_ids), WebhookDelivery.state == "pending")
        .where(WebhookDelivery.next_attempt_at <= func.now())
        .with_for_update(of=WebhookDelivery, skip_locked=True)
    )
    claimed = [(row[0], row[1]) for row in session.execute(found)]
    until = now(session) + timedelta(seconds=lease_seconds)
    for delivery, _ in claimed:
        delivery.next_attempt_at = until
    return claimed


def record_attempt(
    session: Session,
    claimed: WebhookDelivery,
    *,
    status: int | None,
    seconds: float,
    error: str | None,
    again_seconds: float | None,
) -> bool:
    """Writes an attempt and what follows from it: no error: it is delivered; else the next one in so many seconds, or none.

    False where the claim held no longer (it was replayed, or its endpoint deleted): the attempt is written, the delivery stays.
    """
    session.add(WebhookAttempt(delivery_id=claimed.id, status=status, seconds=seconds, error=error))
    state = "delivered" if error is None else "failed" if again_seconds is None else "pending"
    at = now(session)
    changed = session.execute(
        update(WebhookDelivery)
        .where(
            WebhookDelivery.id == claimed.id,
            WebhookDelivery.state == "pending",
            WebhookDelivery.next_attempt_at == claimed.next_attempt_at,
        )
        .values(
            state=state,
            attempts=WebhookDelivery.attempts + 1,
            next_attempt_at=at + timedelta(seconds=again_seconds or 0) if state == "pending" else None,
            finished_at=None if state == "pending" else at,
        ),
        execution_options={"synchronize_session": False},
    )
    return bool(changed.rowcount)  # type: ignore[attr-defined]


def disable(session: Session, endpoint_id: str, reason: str) -> bool:
    """False where it was disabled or deleted before."""
    changed = session.execute(
        update(WebhookEndpoint)
        .where(WebhookEndpoint.id == endpoint_id)
        .where(WebhookEndpoint.disabled_at.is_(None), WebhookEndpoint.deleted_at.is_(None))
        .values(disabled_at=func.clock_timestamp(), disabled_reason=reason),
        execution_options={"synchronize_session": False},
    )
    return bool(changed.rowcount)  # type: ignore[attr-defined]


def overdue(session: Session, *, seconds: float) -> int:
    """How many have been due for so long and nobody has sent them."""
    since = func.now() - timedelta(seconds=seconds)
    found = select(func.count()).where(WebhookDelivery.state == "pending", WebhookDelivery.next_attempt_at < since)
    return session.scalar(found) or 0


def delete_old(session: Session) -> int:
    """Deletes what ended long ago, with its attempts. How many."""
    old = delete(WebhookDelivery).where(WebhookDelivery.finished_at < func.now() - KEPT)
    return session.execute(old).rowcount  # type: ignore[attr-defined,no-any-return]
