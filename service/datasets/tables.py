"""Datasets, whose rows are in the artifact store under their fingerprint, and uploads in parts that may become some."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, func
from sqlalchemy.orm import Mapped, mapped_column

from service.db.engine import Base, CreatedAt


class Dataset(CreatedAt, Base):
    """`fingerprint` is the sha256 of the canonical rows in order: equal content has equal artifacts.

    `detected` is null where the upload came before it was recorded. `skipped` rows are named in a report of `skipped_bytes`.

    `origin` is what was asked of the hub, with the commit: such a dataset is filled when its import (the task whose subject it
    is) has succeeded. Until then what describes its content is null: who works with rows takes datasets that are `is_ready`.
    """

    __tablename__ = "datasets"
    __table_args__ = (
        CheckConstraint("row_count > 0", name="has_rows"),
        CheckConstraint("length(fingerprint) = 64", name="fingerprint_is_sha256"),
        CheckConstraint(
            "origin IS NOT NULL OR num_nulls(fingerprint, row_count, byte_count, sources) = 0",
            name="filled_unless_imported",
        ),
        CheckConstraint("num_nulls(fingerprint, row_count, byte_count, sources) IN (0, 4)", name="filled_at_once"),
        Index("ix_datasets_tenant_id_id", "tenant_id", "id"),
        Index("ix_datasets_fingerprint", "fingerprint"),
        Index("ix_datasets_key_id", "key_id", postgresql_where="deleted_at IS NULL"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))  # none: from before keys had quotas
    name: Mapped[str]
    fingerprint: Mapped[str] = mapped_column(nullable=True)
    row_count: Mapped[int] = mapped_column(BigInteger, nullable=True)
    byte_count: Mapped[int] = mapped_column(BigInteger, nullable=True)
    sources: Mapped[dict[str, Any]] = mapped_column(nullable=True)
    origin: Mapped[dict[str, Any] | None]
    detected: Mapped[dict[str, Any] | None]
    skipped: Mapped[int] = mapped_column(BigInteger, server_default="0")
    skipped_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    deleted_at: Mapped[datetime | None]

    @property
    def is_ready(self) -> bool:
        """Whether it has its rows."""
        return self.fingerprint is not None


class Upload(CreatedAt, Base):
    """A file that is sent in parts. It goes when a dataset was made of it, when it is deleted, and when nothing came for long.

    `received` parts, of `part_bytes` each but the last, are in the artifact store. `rows_read` counts while a dataset is made,
    and no other request makes one of it before `read_until`.
    """

    __tablename__ = "uploads"
    __table_args__ = (
        CheckConstraint("bytes > 0 AND part_bytes > 0", name="has_bytes"),
        CheckConstraint("length(sha256) = 64", name="sha256_is_hex"),
        # The same file again is the same upload: this is how it is resumed.
        Index("uq_uploads_key_id_sha256", "key_id", "sha256", "bytes", unique=True),
        Index("ix_uploads_tenant_id_id", "tenant_id", "id"),
        Index("ix_uploads_used_at", "used_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    sha256: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    part_bytes: Mapped[int]
    received: Mapped[int] = mapped_column(server_default="0")
    rows_read: Mapped[int] = mapped_column(BigInteger, server_default="0")
    read_until: Mapped[datetime | None]
    used_at: Mapped[datetime] = mapped_column(server_default=func.now())
