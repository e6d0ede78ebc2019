"""Tenants and their API keys."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, LargeBinary, String, UniqueConstraint
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


class BrowserSession(CreatedAt, Base):
    """A browser that has logged in with a key, and may do what the key may for as long as both are valid. Only the HMAC of what
    its cookie holds is kept."""

    __tablename__ = "browser_sessions"
    __table_args__ = (
        CheckConstraint("length(digest) = 32", name="digest_is_sha256"),
        Index("ix_browser_sessions_key_id_created_at", "key_id", "created_at"),
    )

    digest: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    expires_at: Mapped[datetime] = mapped_column(index=True)


class LoginLink(CreatedAt, Base):
    """A link that logs a browser in with a key; it is removed when it is used. Only the HMAC of its token is kept."""

    __tablename__ = "login_links"
    __table_args__ = (CheckConstraint("length(digest) = 32", name="digest_is_sha256"),)

    digest: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), index=True)
    expires_at: Mapped[datetime] = mapped_column(index=True)


class KeyUsage(Base):
    """What the jobs of a key use of its quotas. Triggers keep it right, in the transaction of each change of a job.

    `open_jobs` have not ended; `samples` is the sum over all jobs since the key is counted. Whoever holds the row's lock decides
    about the key's next job.
    """

    __tablename__ = "key_usage"

    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), primary_key=True)
    open_jobs: Mapped[int] = mapped_column(BigInteger, server_default="0")
    samples: Mapped[int] = mapped_column(BigInteger, server_default="0")


class KeySamples(Base):
    """A second in which jobs of a key were posted, and the key's sum of samples before it."""

    __tablename__ = "key_samples"
    __table_args__ = (Index("ix_key_samples_sum", "key_id", "samples_before", "second"),)

    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), primary_key=True)
    second: Mapped[datetime] = mapped_column(primary_key=True, index=True)
    samples_before: Mapped[int] = mapped_column(BigInteger)
