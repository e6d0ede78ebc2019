"""Writing the audit log, in the transaction of the change that it tells of."""

from typing import Any, Literal

from sqlalchemy.orm import Session

from service.audit.tables import AuditEntry
from service.tenants.caller import Caller


def record(session: Session, caller: Caller, action: str, object_id: str, **detail: Any) -> None:
    """Writes that the caller did it: `action` is `noun.verb_in_the_past`, `detail` JSON without secrets or samples."""
    session.add(
        AuditEntry(
            tenant_id=caller.tenant_id,
            key_id=caller.key_id,
            actor="api",
            action=action,
            object_id=object_id,
            request_id=caller.request_id,
            detail=detail,
        )
    )


def record_own(
    session: Session, actor: Literal["cli", "system"], tenant_id: str | None, action: str, object_id: str, **detail: Any
) -> None:
    """Writes what an operator did from the command line, or the service by itself."""
    session.add(AuditEntry(tenant_id=tenant_id, actor=actor, action=action, object_id=object_id, detail=detail))
