"""The audit log: who did what. PostgreSQL refuses every change of it but an insert."""

from typing import Any

from sqlalchemy import BigInteger, Identity, Index
from sqlalchemy.orm import Mapped, mapped_column

from service.db.engine import Base, CreatedAt


class AuditEntry(CreatedAt, Base):
    """`actor` is `api` (then `key_id` says whose key), `cli` (an operator) or `system` (the retention).

    No foreign keys: an entry outlives the objects that it names.
    """

    __tablename__ = "audit_log"
    __table_args__ = (
        Index("ix_audit_log_tenant_id_id", "tenant_id", "id"),
        Index("ix_audit_log_tenant_id_object_id_id", "tenant_id", "object_id", "id"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    tenant_id: Mapped[str | None]
    key_id: Mapped[str | None]
    actor: Mapped[str]
    action: Mapped[str]
    object_id: Mapped[str]
    request_id: Mapped[str | None]
    detail: Mapped[dict[str, Any]]
