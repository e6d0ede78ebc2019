"""Tenants and their API keys."""

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, LargeBinary, String, UniqueConstraint
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from service.db.engine import Base, CreatedAt


class Tenant(CreatedAt, Base):
    """`last_scheduled_at`: when a unit of this tenant was last claimed, which decides the order between tenants."""

    __tablename__ = "tenants"
    __table_args__ = (UniqueConstraint("name"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    last_scheduled_at: Mapped[datetime | None]


class ApiKey(CreatedAt, Base):
    """A bearer key. Only its HMAC-SHA256 under the server's secret is kept; the prefix finds the row.

    `limits`: overrides of the limit settings, by name.
    """

    __tablename__ = "api_keys"
    __table_args__ = (
        UniqueConstraint("prefix"),
        CheckConstraint("length(digest) = 32", name="digest_is_sha256"),
        CheckConstraint("scopes <@ ARRAY['read', 'submit', 'admin']::varchar[]", name="scopes_known"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str]
    prefix: Mapped[str]
    digest: Mapped[bytes] = mapped_column(LargeBinary)
    scopes: Mapped[list[str]] = mapped_column(ARRAY(String), server_default="{read,submit}")
    limits: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
