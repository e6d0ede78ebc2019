"""All SQL of idempotency keys."""

from datetime import timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.idempotency.tables import IdempotencyKey

KEPT = timedelta(hours=24)


def find(session: Session, tenant_id: str, key: str) -> IdempotencyKey | None:
    """The stored answer, unless it has expired."""
    return session.scalar(
        select(IdempotencyKey).where(
            IdempotencyKey.tenant_id == tenant_id,
            IdempotencyKey.key == key,
            IdempotencyKey.created_at > func.now() - KEPT,
        )
    )


def put(
    session: Session,
    tenant_id: str,
    key: str,
    *,
    request_sha256: bytes,
    status: int,
    headers: dict[str, str],
    sealed_body: bytes,
) -> None:
    """Stores an answer, replacing an expired one. First flushes the effect that it reports."""
    session.flush()
    kept = {"request_sha256": request_sha256, "status": status, "headers": headers, "sealed_body": sealed_body}
    written = insert(IdempotencyKey).values(tenant_id=tenant_id, key=key, **kept)
    session.execute(
        written.on_conflict_do_update(index_elements=["tenant_id", "key"], set_={**kept, "created_at": func.now()})
    )


def delete_old(session: Session) -> int:
    """Deletes expired answers and returns their number."""
    return session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at <= func.now() - KEPT)).rowcount  # type: ignore[attr-defined,no-any-return]
