"""All SQL of idempotency keys."""

from datetime import timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.idempotency.tables import IdempotencyKey

KEPT = timedelta(hours=24)


def lock_if_free(session: Session, tenant_id: str, key: str) -> bool:
    """Until the transaction ends no other one may use the key; False where one does. A process that dies gives it back."""
    name = func.hashtextextended(f"idempotency/{tenant_id}/{key}", 0)
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(name))))


def find(session: Session, tenant_id: str, key: str) -> IdempotencyKey | None:
    """The answer that is kept, if it is not too old."""
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
    """Keeps an answer, in the place of one that is too old. Flushes first what the answer tells of."""
    session.flush()
    kept = {"request_sha256": request_sha256, "status": status, "headers": headers, "sealed_body": sealed_body}
    written = insert(IdempotencyKey).values(tenant_id=tenant_id, key=key, **kept)
    session.execute(
        written.on_conflict_do_update(index_elements=["tenant_id", "key"], set_={**kept, "created_at": func.now()})
    )


def delete_old(session: Session) -> int:
    """Deletes what is too old to be answered with. How many."""
    return session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at <= func.now() - KEPT)).rowcount  # type: ignore[attr-defined,no-any-return]
