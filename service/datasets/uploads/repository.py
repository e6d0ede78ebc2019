"""All SQL on uploads in parts. A tenant's scope is part of each query that a caller's id reaches."""

from collections.abc import Collection
from datetime import timedelta

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from service import ids
from service.datasets.tables import Upload
from service.db.pagination import paginate

# A process that ends in the midst of it leaves this behind: then the next attempt has to wait for so long.
_READ = {"used_at": func.now(), "read_until": func.now() + timedelta(minutes=1)}


def add(session: Session, upload: Upload) -> None:
    session.add(upload)
    session.flush()
    session.refresh(upload)


def find(session: Session, tenant_id: str, upload_id: str) -> Upload | None:
    if not ids.is_id("up", upload_id):
        return None
    return session.scalar(select(Upload).where(Upload.id == upload_id, Upload.tenant_id == tenant_id))


def find_same(session: Session, key_id: str, sha256: str, size: int) -> Upload | None:
    """The upload of the key with this content."""
    return session.scalar(select(Upload).where(Upload.key_id == key_id, Upload.sha256 == sha256, Upload.bytes == size))


def page(session: Session, tenant_id: str, after: str | None, limit: int) -> tuple[list[Upload], bool]:
    """Of the tenant's uploads, newest first."""
    return paginate(session, select(Upload).where(Upload.tenant_id == tenant_id), Upload.id, after=after, limit=limit)


def count(session: Session, key_id: str) -> int:
    return session.scalar(select(func.count()).where(Upload.key_id == key_id)) or 0


def count_part(session: Session, upload_id: str, number: int) -> bool:
    """Whether the part was the next one, and now counts as received."""
    counted = update(Upload).where(Upload.id == upload_id, Upload.received == number)
    return bool(session.execute(counted.values(received=number + 1, used_at=func.now())).rowcount)  # type: ignore[attr-defined]


def begin_reading(session: Session, upload_id: str) -> bool:
    """Whether nobody else makes a dataset of it; now the caller does, and renews it by `note_reading`."""
    free = or_(Upload.read_until.is_(None), Upload.read_until < func.now())
    return bool(session.execute(update(Upload).where(Upload.id == upload_id, free).values(**_READ)).rowcount)  # type: ignore[attr-defined]


def note_reading(session: Session, upload_id: str, rows: int) -> None:
    session.execute(update(Upload).where(Upload.id == upload_id).values(rows_read=rows, **_READ))


def end_reading(session: Session, upload_id: str) -> None:
    session.execute(update(Upload).where(Upload.id == upload_id).values(rows_read=0, read_until=None))


def remove(session: Session, upload_id: str) -> bool:
    """Whether it was there until now; until the transaction ends, nobody else finds out."""
    return bool(session.execute(delete(Upload).where(Upload.id == upload_id)).rowcount)  # type: ignore[attr-defined]


def expired(session: Session, hours: float, limit: int | None) -> list[Upload]:
    """Those that nothing was done with for so long, the oldest first; the transaction holds them against every other."""
    old = select(Upload).where(Upload.used_at < func.now() - timedelta(hours=hours))
    return list(session.scalars(old.order_by(Upload.used_at).limit(limit).with_for_update(skip_locked=True)))


def existing(session: Session, upload_ids: Collection[str]) -> set[str]:
    """Those of the uploads, of any tenant, that are there."""
    return set(session.scalars(select(Upload.id).where(Upload.id.in_(upload_ids))))
