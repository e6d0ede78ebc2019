"""Every state change of a task, in SQL. Callers commit."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy import delete as delete_from
from sqlalchemy.orm import Session, aliased

from service.ids import new_id
from service.ledger import Lack, LeaseLost, Retries
from service.ledger.rows import in_seconds
from service.tasks.tables import Task, TaskState


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskClaim:
    """A task under a lease. `attempt` goes with every write."""

    task_id: str
    attempt: int
    kind: str
    subject: str
    tenant_id: str
    key_id: str
    input: dict[str, Any]


def create(
    session: Session,
    *,
    kind: str,
    subject: str,
    tenant_id: str,
    key_id: str,
    input: Mapping[str, Any],
    urgent: bool = False,
    kept_seconds: int | None = None,
) -> Task:
    """Adds a task of a kind of `worker/tasks/kinds.py`; a trigger wakes a worker once this is committed.

    An `input["model"]`, as jobs have it, keeps the task from workers that do not have the model.
    """
    task = Task(
        id=new_id("task"),
        kind=kind,
        subject=subject,
        tenant_id=tenant_id,
        key_id=key_id,
        input=dict(input),
        urgent=urgent,
        state=TaskState.PENDING,
        kept_seconds=kept_seconds,
    )
    session.add(task)
    session.flush()
    return task


def latest(session: Session, tenant_id: str, kind: str, subject: str) -> Task | None:
    """The tenant's newest task of the kind for the subject, as it is now."""
    found = select(Task).where(Task.subject == subject, Task.kind == kind, Task.tenant_id == tenant_id)
    newest = found.order_by(Task.id.desc()).limit(1)
    return session.scalar(newest.execution_options(populate_existing=True))


def newest_of(session: Session, kind: str, subjects: Collection[str]) -> dict[str, Task]:
    """The newest task of the kind for each subject that has one."""
    found = select(Task).where(Task.subject.in_(subjects), Task.kind == kind).order_by(Task.id)
    return {task.subject: task for task in session.scalars(found.execution_options(populate_existing=True))}


def delete(session: Session, task_id: str) -> None:
    """Cancels the task, or forgets it; whatever its worker still writes takes no effect."""
    session.execute(delete_from(Task).where(Task.id == task_id))


def claim_task(
    session: Session,
    *,
    worker_id: str,
    lease_seconds: float,
    kinds: Collection[str],
    without: Sequence[Lack] = (),
) -> TaskClaim | None:
    """Takes a task of one of the kinds, or None: the urgent first, then those of the tenant whose last one began longest ago, its
    oldest first. What the worker lacks (`without`) is left to others; what another transaction holds is skipped."""
    other = aliased(Task)
    last_turn = select(func.max(other.started_at)).where(other.tenant_id == Task.tenant_id).scalar_subquery()
    lacking = [lack.model for lack in without if lack.model is not None]
    model = Task.input["model"]
    first = (
        select(Task.id)
        .where(*_is_claimable(), Task.kind.in_(kinds), or_(model.is_(None), model.not_in(lacking)))
        .order_by(Task.urgent.desc(), last_turn.nulls_first(), Task.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    taken = session.scalars(
        update(Task)
        .where(Task.id == first.scalar_subquery())
        .values(
            state=TaskState.RUNNING,
            attempt=Task.attempt + 1,
            worker_id=worker_id,
            lease_expires_at=in_seconds(lease_seconds),
            started_at=func.clock_timestamp(),
            not_before=None,
        )
        .returning(Task)
        .execution_options(populate_existing=True, synchronize_session=False)
    ).one_or_none()
    return None if taken is None else _claim_of(taken)


def claimable_count(session: Session, *, most: int) -> int:
    """How many tasks a worker could take now, counted up to `most`."""
    waiting = select(Task.id).where(*_is_claimable()).limit(most)
    return session.scalar(select(func.count()).select_from(waiting.subquery())) or 0


def beat(session: Session, claim: TaskClaim, *, lease_seconds: float, progress: Mapping[str, Any] | None) -> None:
    """Renews the lease and writes the progress.

    Raises:
        LeaseLost: the task is no longer this worker's, or was deleted.
    """
    known = {} if progress is None else {"progress": dict(progress)}
    _write(session, claim, lease_expires_at=in_seconds(lease_seconds), **known)


def finish_task(session: Session, claim: TaskClaim, result: Mapping[str, Any]) -> None:
    """
    Raises:
        LeaseLost: the task is no longer this worker's, or was deleted.
    """
    _end(session, claim, TaskState.SUCCEEDED, result=dict(result), error=None)


def fail_task(
    session: Session, claim: TaskClaim, error: Mapping[str, Any], *, retryable: bool, retries: Retries
) -> bool:
    """Ends an attempt with its error {code, detail}; True where the task has failed with it, False where it will be retried.

    Raises:
        LeaseLost: the task is no longer this worker's, or was deleted.
    """
    failures = _write(session, claim, failures=Task.failures + 1, error=dict(error)).failures
    if retryable and failures < retries.max_attempts:
        _end(session, claim, TaskState.PENDING, not_before=in_seconds(retries.delay(failures)))
        return False
    _end(session, claim, TaskState.FAILED)
    return True


def release_task(session: Session, claim: TaskClaim) -> None:
    """Gives it back unfinished (a worker that shuts down, or that lacks something). Not an attempt that failed.

    Raises:
        LeaseLost: the task is no longer this worker's, or was deleted.
    """
    _end(session, claim, TaskState.PENDING)


def expire_leases(session: Session, *, retries: Retries) -> int:
    """Gives back the tasks whose lease ran out, or fails them after their last attempt. Returns how many."""
    expired = session.scalars(
        select(Task)
        .where(Task.state == TaskState.RUNNING, Task.lease_expires_at < func.clock_timestamp())
        .order_by(Task.id)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
    at_once = Retries(max_attempts=retries.max_attempts, seconds=0)  # a lease was wait enough
    for task in expired:
        error = {
            "code": "lease_expired",
            "detail": f"Worker {task.worker_id} stopped answering (killed, cut off, or out of memory).",
        }
        fail_task(session, _claim_of(task), error, retryable=True, retries=at_once)
    return len(expired)


def delete_expired(session: Session) -> int:
    """Deletes the tasks that are kept no longer. Returns how many."""
    kept_until = func.coalesce(Task.finished_at, Task.created_at) + func.make_interval(
        0, 0, 0, 0, 0, 0, Task.kept_seconds
    )
    over = Task.kept_seconds.is_not(None), Task.state != TaskState.RUNNING, kept_until < func.clock_timestamp()
    return len(session.scalars(delete_from(Task).where(*over).returning(Task.id)).all())


def _is_claimable() -> tuple[ColumnElement[bool], ...]:
    is_due = or_(Task.not_before.is_(None), Task.not_before <= func.clock_timestamp())
    return Task.state == TaskState.PENDING, is_due


def _end(session: Session, claim: TaskClaim, state: TaskState, **values: Any) -> None:
    finished = None if state == TaskState.PENDING else func.clock_timestamp()
    _write(session, claim, state=state, lease_expires_at=None, finished_at=finished, **values)


def _write(session: Session, claim: TaskClaim, **values: Any) -> Task:
    is_current = Task.id == claim.task_id, Task.state == TaskState.RUNNING, Task.attempt == claim.attempt
    written = update(Task).where(*is_current).values(**values).returning(Task)
    task = session.scalars(written.execution_options(populate_existing=True, synchronize_session=False)).one_or_none()
    if task is None:
        raise LeaseLost
    return task


def _claim_of(task: Task) -> TaskClaim:
    return TaskClaim(
        task_id=task.id,
        attempt=task.attempt,
        kind=task.kind,
        subject=task.subject,
        tenant_id=task.tenant_id,
        key_id=task.key_id,
        input=task.input,
    )
