"""The SQL of previews; what a task is, and how it ends, is `service.tasks`."""

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from service.tasks import Task, TaskState

KIND = "preview"
_OPEN = (TaskState.PENDING, TaskState.RUNNING)


def open_count(session: Session, tenant_id: str) -> int:
    """How many of the tenant's previews are yet to be computed."""
    found = select(func.count()).where(Task.tenant_id == tenant_id, Task.kind == KIND, Task.state.in_(_OPEN))
    return session.scalar(found) or 0


def delete_all_but_newest(session: Session, tenant_id: str, count: int) -> None:
    """Deletes the tenant's computed previews but the newest `count`."""
    done = select(Task.id).where(Task.tenant_id == tenant_id, Task.kind == KIND, Task.state.not_in(_OPEN))
    session.execute(delete(Task).where(Task.id.in_(done.order_by(Task.id.desc()).offset(count))))
