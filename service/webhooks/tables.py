"""Webhooks: endpoints, deliveries, attempts. A trigger on job_events makes the deliveries."""

from datetime import datetime

from sqlalchemy import REAL, BigInteger, CheckConstraint, ForeignKey, Identity, Index, LargeBinary, String
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from service.db.engine import Base, CreatedAt


class WebhookEndpoint(CreatedAt, Base):
    """Where a tenant wants to be notified of which events. Its row stays when it is deleted: a delivery may be written just then.

    The secrets are sealed; the previous one signs beside the new one until `previous_secret_until`.
    """

    __tablename__ = "webhook_endpoints"
    __table_args__ = (Index("ix_webhook_endpoints_tenant_id_id", "tenant_id", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    url: Mapped[str]
    description: Mapped[str]
    events: Mapped[list[str]] = mapped_column(ARRAY(String))
    sealed_secret: Mapped[bytes] = mapped_column(LargeBinary)
    sealed_previous_secret: Mapped[bytes | None] = mapped_column(LargeBinary)
    previous_secret_until: Mapped[datetime | None]
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]
    deleted_at: Mapped[datetime | None]

    @property
    def enabled(self) -> bool:
        return self.disabled_at is None


class WebhookDelivery(CreatedAt, Base):
    """One event for one endpoint; `payload` is the body as it is sent, byte for byte, each time.

    `attempts` counts since it was made or replayed; while one runs, `next_attempt_at` is when another process may take it over.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("state::text IN ('pending', 'delivered', 'failed')", name="state_known"),
        CheckConstraint("(state = 'pending') = (next_attempt_at IS NOT NULL)", name="due_when_pending"),
        Index("ix_webhook_deliveries_endpoint_id_id", "endpoint_id", "id"),
        Index("ix_webhook_deliveries_endpoint_id_state_id", "endpoint_id", "state", "id"),
        Index("ix_webhook_deliveries_due", "endpoint_id", "next_attempt_at", postgresql_where="state = 'pending'"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"))
    job_id: Mapped[str | None]
    type: Mapped[str]
    payload: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="pending")
    attempts: Mapped[int] = mapped_column(server_default="0")
    next_attempt_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class WebhookAttempt(CreatedAt, Base):
    """One try: the status that the endpoint answered with, or why there was no answer."""

    __tablename__ = "webhook_attempts"
    __table_args__ = (Index("ix_webhook_attempts_delivery_id_id", "delivery_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    delivery_id: Mapped[str] = mapped_column(ForeignKey("webhook_deliveries.id", ondelete="CASCADE"))
    status: Mapped[int | None]
    seconds: Mapped[float] = mapped_column(REAL)
    error: Mapped[str | None]
