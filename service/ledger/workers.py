"""The workers that run: each reports itself every few seconds. No unit depends on it; plans, metrics and `winnow doctor` do."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, delete, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.ledger.tables import Worker

_KEPT = timedelta(days=1)


def record_worker(session: Session, worker_id: str, version: str, *, stopped: bool = False, **known: Any) -> None:
    """Writes that the worker runs now, or that it has stopped in good order.

    Args:
        known: what it has measured: `device`, `memory_bytes` and `matmul_rates` (operations a second by dtype); and `lacks`.
    """
    now = func.clock_timestamp()
    seen = {"version": version, "seen_at": now, "stopped_at": now if stopped else None, **known}
    written = insert(Worker).values(worker_id=worker_id, started_at=now, **seen)
    session.execute(written.on_conflict_do_update(index_elements=[Worker.worker_id], set_=seen))


_NEWEST_MEASURED = (
    select(Worker.worker_id).where(Worker.device.is_not(None)).order_by(Worker.started_at.desc()).limit(1)
)


def newest_measured_worker(session: Session) -> Worker | None:
    """The worker that started last, of those that have measured their machine."""
    return session.scalar(select(Worker).where(Worker.worker_id.in_(_NEWEST_MEASURED)))


_RECENT = text("""
    SELECT worker_id, version, seen_at >= clock_timestamp() - make_interval(secs => :silent_seconds) AS is_alive,
        ARRAY(SELECT DISTINCT lack ->> 'problem' FROM jsonb_array_elements(lacks) lack ORDER BY 1) AS problems,
        EXISTS (SELECT FROM jsonb_array_elements(lacks) lack WHERE NOT lack ?| '{model,job_id}') AS is_retired
    FROM workers
    WHERE stopped_at IS NULL AND seen_at > clock_timestamp() - greatest(interval '1 day', make_interval(secs => :silent_seconds))
    ORDER BY worker_id
""")


def recent_workers(session: Session, *, silent_seconds: float) -> Sequence[Row[Any]]:
    """(worker_id, version, is_alive, problems, is_retired) of those alive within a day that have not reported their end.

    `problems`: what it lacks; `is_retired`: so that it takes no work at all.
    """
    return session.execute(_RECENT, {"silent_seconds": silent_seconds}).all()


def silent_workers(session: Session) -> list[str]:
    """Those not seen for a day; but plans still need what the newest one has measured."""
    return list(session.scalars(select(Worker.worker_id).where(*_is_silent())))


def delete_silent_workers(session: Session) -> list[str]:
    return list(session.scalars(delete(Worker).where(*_is_silent()).returning(Worker.worker_id)))


def _is_silent() -> tuple[ColumnElement[bool], ...]:
    return Worker.seen_at < func.now() - _KEPT, Worker.worker_id.not_in(_NEWEST_MEASURED)
