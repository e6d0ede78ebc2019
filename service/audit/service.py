"""Writing the audit log, in the transaction of the change itself."""

from typing import Any, Literal

from sqlalchemy.orm import Session

from service.audit.tables import AuditEntry
from service.auth.principal import Principal


def record(session: Session, principal: Principal, action: str, object_id: str, **detail: Any) -> None:
    """Records that the principal did it: `action` is `noun.verb_in_the_past`, `detail` JSON without secrets or samples."""
    session.add(
        AuditEntry(
            tenant_id=principal.tenant_id,
            key_id=principal.key_id,
            actor="api",
            action=action,
            object_id=object_id,
            request_id=principal.request_id,
            detail=detail,
        )
    )


def record_own(
    session: Session, actor: Literal["cli", "system"], tenant_id: str | None, action: str, object_id: str, **detail: Any
) -> None:
    """Records what an operator did from the command line, or the service by itself."""
    session.add(AuditEntry(tenant_id=tenant_id, actor=actor, action=action, object_id=object_id, detail=detail))
