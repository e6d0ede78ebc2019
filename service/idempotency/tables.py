"""Stored answers to requests with an `Idempotency-Key`."""

from typing import Any

from sqlalchemy import ForeignKey, Index, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from service.db.engine import Base, CreatedAt


class IdempotencyKey(CreatedAt, Base):
    """The answer to the first request with this key; the body is encrypted, since it may contain a new API key."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("ix_idempotency_keys_created_at", "created_at"),)

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[bytes] = mapped_column(LargeBinary)
    status: Mapped[int]
    headers: Mapped[dict[str, Any]]
    sealed_body: Mapped[bytes] = mapped_column(LargeBinary)
