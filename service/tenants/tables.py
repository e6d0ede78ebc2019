"""Tenants and their API keys."""

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, LargeBinary, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from service.database import Base, CreatedAt


class Tenant(CreatedAt, Base):
    __tablename__ = "tenants"
    __table_args__ = (UniqueConstraint("name"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]


class ApiKey(CreatedAt, Base):
    """A bearer key. Only its HMAC-SHA256 under the server's secret is kept; the prefix finds the row."""

    __tablename__ = "api_keys"
    __table_args__ = (
        UniqueConstraint("prefix"),
        CheckConstraint("length(digest) = 32", name="digest_is_sha256"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str]
    prefix: Mapped[str]
    digest: Mapped[bytes] = mapped_column(LargeBinary)
    revoked_at: Mapped[datetime | None]
