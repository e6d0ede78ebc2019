"""Uploaded datasets. Their rows are in the artifact store, under their fingerprint."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from service.db.engine import Base, CreatedAt


class Dataset(CreatedAt, Base):
    """`fingerprint` is the sha256 of the canonical rows in order: equal content has equal artifacts.

    `detected` is null where the upload came before it was recorded. `skipped` rows are named in a report of `skipped_bytes`.
    """

    __tablename__ = "datasets"
    __table_args__ = (
        CheckConstraint("row_count > 0", name="has_rows"),
        CheckConstraint("length(fingerprint) = 64", name="fingerprint_is_sha256"),
        Index("ix_datasets_tenant_id_id", "tenant_id", "id"),
        Index("ix_datasets_fingerprint", "fingerprint"),
        Index("ix_datasets_key_id", "key_id", postgresql_where="deleted_at IS NULL"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))  # none: from before keys had quotas
    name: Mapped[str]
    fingerprint: Mapped[str]
    row_count: Mapped[int] = mapped_column(BigInteger)
    byte_count: Mapped[int] = mapped_column(BigInteger)
    sources: Mapped[dict[str, Any]]
    detected: Mapped[dict[str, Any] | None]
    skipped: Mapped[int] = mapped_column(BigInteger, server_default="0")
    skipped_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    deleted_at: Mapped[datetime | None]
