"""Tasks: their input, who does them, how far they are, and what came of them."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import CheckConstraint, Enum, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from service.db.engine import Base, CreatedAt


class TaskState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class Task(CreatedAt, Base):
    """`subject` names what it is for: the trigger on the end of a task wakes whoever waits for that.

    `attempt` counts the claims and is the fence; `failures` counts those that failed. `urgent`: someone waits for the answer.
    One with `kept_seconds` is deleted so long after its end, or after its creation if no worker takes it.
    """

    __tablename__ = "tasks"
    __table_args__ = (
        CheckConstraint("(state = 'running') = (lease_expires_at IS NOT NULL)", name="lease_when_running"),
        CheckConstraint(
            "(state IN ('succeeded', 'failed')) = (finished_at IS NOT NULL)", name="finished_when_terminal"
        ),
        CheckConstraint("state <> 'failed' OR error IS NOT NULL", name="error_when_failed"),
        Index("ix_tasks_pending", "id", postgresql_where="state = 'pending'"),
        Index("ix_tasks_lease_expires_at", "lease_expires_at", postgresql_where="state = 'running'"),
        Index("ix_tasks_tenant_id_started_at", "tenant_id", "started_at"),
        Index("ix_tasks_subject", "subject"),
        Index("ix_tasks_kept", "created_at", postgresql_where="kept_seconds IS NOT NULL"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    subject: Mapped[str]
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    urgent: Mapped[bool] = mapped_column(server_default="false")
    input: Mapped[dict[str, Any]]
    state: Mapped[TaskState] = mapped_column(
        Enum(TaskState, name="task_state", values_callable=lambda members: [member.value for member in members])
    )
    attempt: Mapped[int] = mapped_column(server_default="0")
    failures: Mapped[int] = mapped_column(server_default="0")
    worker_id: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    progress: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    kept_seconds: Mapped[int | None]
