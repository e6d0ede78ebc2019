"""SQL of webhooks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, func, or_, select, text, update
from sqlalchemy.orm import Session

from service import ids
from service.db.pagination import paginate
from service.webhooks.tables import WebhookAttempt, WebhookDelivery, WebhookEndpoint

CHANNEL = "winnow_webhooks"
KEPT = timedelta(days=30)


def count(session: Session, tenant_id: str) -> int:
    found = select(func.count()).where(WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None))
    return session.scalar(found) or 0


def get(session: Session, tenant_id: str, endpoint_id: str, *, lock: bool = False) -> WebhookEndpoint | None:
    """The endpoint, unless it is deleted; `lock` locks it until the transaction ends."""
    if not ids.is_id("whk", endpoint_id):
        return None
    found = select(WebhookEndpoint).where(
        WebhookEndpoint.id == endpoint_id,
        WebhookEndpoint.tenant_id == tenant_id,
        WebhookEndpoint.deleted_at.is_(None),
    )
    # NO KEY: the trigger that writes deliveries refers to the row, and must not wait.
    return session.scalar(found.with_for_update(key_share=True) if lock else found)


def page(session: Session, tenant_id: str, *, after: str | None, limit: int) -> tuple[list[WebhookEndpoint], bool]:
    """Newest first."""
    live = select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.deleted_at.is_(None))
    return paginate(session, live, WebhookEndpoint.id, after=after, limit=limit)


def get_delivery(session: Session, endpoint_id: str, delivery_id: str, *, lock: bool = False) -> WebhookDelivery | None:
    if not ids.is_id("msg", delivery_id):
        return None
    found = select(WebhookDelivery).where(WebhookDelivery.id == delivery_id, WebhookDelivery.endpoint_id == endpoint_id)
    return session.scalar(found.with_for_update() if lock else found)


def deliveries(
    session: Session, endpoint_id: str, *, after: str | None, state: str | None, limit: int
) -> tuple[list[WebhookDelivery], bool]:
    """Newest first."""
    found = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    if state is not None:
        found = found.where(WebhookDelivery.state == state)
    return paginate(session, found, WebhookDelivery.id, after=after, limit=limit)


def attempts(session: Session, delivery_id: str) -> Sequence[WebhookAttempt]:
    """Oldest first."""
    found = select(WebhookAttempt).where(WebhookAttempt.delivery_id == delivery_id)
    return session.scalars(found.order_by(WebhookAttempt.id)).all()


def notify(session: Session) -> None:
    """Wakes the senders when the transaction is committed."""
    session.execute(select(func.pg_notify(CHANNEL, "")))


def now(session: Session) -> datetime:
    found: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return found


def fail_unwanted(session: Session, endpoint_id: str | None = None) -> None:
    """Fails the pending messages of disabled and deleted endpoints, or of this one alone.

    All of them: an event may have been written while its endpoint was being disabled.
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
    """The messages that are due, oldest first, and at most `each` per endpoint, so that a long queue hides no other one."""
    return [Due(row.id, row.endpoint_id, row.tenant_id) for row in session.execute(_DUE, {"each": each})]


def claim(
    session: Session, delivery_ids: Collection[str], *, lease_seconds: float
) -> list[tuple[WebhookDelivery, WebhookEndpoint]]:
    """Claims those that are still due, each with its endpoint: until the lease ends no other process sends them."""
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
    """Logs an attempt. Without an error the message is delivered; else it is retried in `again_seconds`, or has failed if None.

    Returns False if the claim is no longer valid (a replay, a deleted endpoint): the attempt is logged, the delivery unchanged.
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
