"""Selection jobs, their units of work and their events: the ledger that holds the truth about what runs."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Enum, ForeignKey, Identity, Index, String, UniqueConstraint
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from service.db.engine import Base, CreatedAt
from service.ledger.state import JobStatus, UnitState
from service.plan.stages import Stage


def _enum(kind: type[StrEnum], name: str) -> Enum:
    return Enum(kind, name=name, values_callable=lambda members: [member.value for member in members])


class SelectionJob(CreatedAt, Base):
    """One request. `parameters` is the request with every default written out; `model` what it was resolved to."""

    __tablename__ = "selection_jobs"
    __table_args__ = (
        CheckConstraint(
            "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)",
            name="finished_when_terminal",
        ),
        CheckConstraint("(status = 'failed') = (error IS NOT NULL)", name="error_when_failed"),
        CheckConstraint("budget > 0", name="budget_positive"),
        Index("ix_selection_jobs_tenant_id_id", "tenant_id", "id"),
        Index(
            "ix_selection_jobs_live_by_status",
            *("tenant_id", "status", "id"),
            postgresql_where="deleted_at IS NULL",
        ),
        Index("ix_selection_jobs_pool_id", "pool_id"),
        Index(
            "ix_selection_jobs_key_id_created_at", "key_id", "created_at"
        ),  # by which the version before counts quotas
        Index("ix_selection_jobs_target_id", "target_id"),
        # What a claim looks through: the few jobs that are not finished, each tenant's oldest first.
        Index(
            "ix_selection_jobs_open",
            *("tenant_id", "created_at", "id"),
            postgresql_where="status IN ('queued', 'running', 'cancelling')",
        ),
        Index("ix_selection_jobs_awaiting", "id", postgresql_where="awaits_datasets AND status = 'queued'"),
        Index(
            "ix_selection_jobs_unplanned",
            "id",
            postgresql_where="awaits_plan AND status IN ('queued', 'running')",
        ),
        Index(
            "ix_selection_jobs_terms", "terms", postgresql_using="gin", postgresql_where="terms IS NOT NULL"
        ),  # by which lists are filtered: of those that have a name or labels
        CheckConstraint("budget IS NOT NULL OR awaits_datasets", name="budget_once_started"),
        CheckConstraint("deleted_at IS NULL OR finished_at IS NOT NULL", name="deleted_when_terminal"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"))
    status: Mapped[JobStatus] = mapped_column(_enum(JobStatus, "job_status"))
    pool_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    target_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    model: Mapped[dict[str, Any]]
    budget: Mapped[int] = mapped_column(
        BigInteger, nullable=True
    )  # a share of a pool that is still being imported: null
    parameters: Mapped[dict[str, Any]]
    request: Mapped[dict[str, Any]]
    job_metadata: Mapped[dict[str, Any]]
    error: Mapped[dict[str, Any] | None]
    started_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    trace: Mapped[str | None]  # of the request that posted it (W3C traceparent), for the spans of its units
    awaits_datasets: Mapped[bool] = mapped_column(server_default="false")  # being imported; it has no units before
    awaits_plan: Mapped[bool] = mapped_column(server_default="false")  # which its first unit waits for a moment
    retry_of: Mapped[str | None] = mapped_column(ForeignKey("selection_jobs.id"))
    reproduces: Mapped[str | None] = mapped_column(ForeignKey("selection_jobs.id"))
    # What people call it, which nothing that is computed depends on; the last two are what is searched (`service.jobs.naming`).
    name: Mapped[str | None]
    labels: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    folded_name: Mapped[str | None]
    terms: Mapped[list[str] | None] = mapped_column(ARRAY(String))
    # By its last plan, of one worker: {"total": seconds or null, "stages": {stage: seconds or null}}.
    planned_seconds: Mapped[dict[str, Any] | None]


class JobUnit(CreatedAt, Base):
    """A piece of a stage that one worker does. Its output is the artifact `artifact_key`; where that exists, it is done.

    `attempt` counts the claims and is the fence: a worker writes only while the row is running under its own attempt.
    `failures` counts the attempts that failed (not those given back in good order); at the limit the job fails. After one of
    them the unit waits until `not_before`. Where it found an artifact of an earlier unit missing or damaged, it waits until
    that unit (`waits_for`, its id) has succeeded again.
    """

    __tablename__ = "job_units"
    __table_args__ = (
        UniqueConstraint("job_id", "stage", "shard"),
        CheckConstraint("attempt >= 0", name="attempt_not_negative"),
        CheckConstraint(
            "(state = 'running') = (lease_expires_at IS NOT NULL)"
            " AND (state <> 'running' OR (worker_id IS NOT NULL AND started_at IS NOT NULL))",
            name="lease_when_running",
        ),
        CheckConstraint("0 <= progress_done AND progress_done <= progress_total", name="progress_within_total"),
        Index("ix_job_units_pending", "job_id", "stage", "shard", postgresql_where="state = 'pending'"),
        # What a plan looks at: the newest units of each stage.
        Index("ix_job_units_stage_finished_at", "stage", "finished_at", postgresql_where="state = 'succeeded'"),
        Index("ix_job_units_lease_expires_at", "lease_expires_at", postgresql_where="state = 'running'"),
        # Two jobs that need the same artifact do not compute it at once: the second waits and then finds it.
        Index("uq_job_units_artifact_key_running", "artifact_key", unique=True, postgresql_where="state = 'running'"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("selection_jobs.id", ondelete="CASCADE"))
    stage: Mapped[Stage] = mapped_column(_enum(Stage, "stage"))
    shard: Mapped[int]
    artifact_key: Mapped[str]
    code: Mapped[str | None]  # version of the worker that named the artifact; none: of the API, and any worker's
    spec: Mapped[dict[str, Any]]
    state: Mapped[UnitState] = mapped_column(_enum(UnitState, "unit_state"))
    attempt: Mapped[int] = mapped_column(server_default="0")
    failures: Mapped[int] = mapped_column(server_default="0")
    worker_id: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    waits_for: Mapped[int | None] = mapped_column(BigInteger)
    progress_done: Mapped[int] = mapped_column(BigInteger, server_default="0")
    progress_total: Mapped[int] = mapped_column(BigInteger)
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class JobEvent(CreatedAt, Base):
    """What happened to a job, in order. Written in the transaction of the change that it reports."""

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job_id_id", "job_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("selection_jobs.id", ondelete="CASCADE"))
    type: Mapped[str]
    data: Mapped[dict[str, Any]]


class Worker(Base):
    """A worker process that runs or ran lately. It reports every few seconds, and when it stops in good order.

    What it has measured of its machine (null until a compute process has started) is what a plan's seconds are computed from
    before stages have run.
    """

    __tablename__ = "workers"

    worker_id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str]
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    stopped_at: Mapped[datetime | None]
    device: Mapped[str | None]
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    matmul_rates: Mapped[dict[str, Any] | None]  # {dtype: operations a second}
    # What it cannot do, for how long already: {problem, seconds}, and `model` or `job_id` where it is that alone.
    lacks: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default="[]")


class StoreIdentity(CreatedAt, Base):
    """The one row that says which artifact store is this database's. `marked_at` is null until the store carries the id."""

    __tablename__ = "artifact_stores"
    __table_args__ = (UniqueConstraint("is_only"), CheckConstraint("is_only", name="only_one"))

    id: Mapped[str] = mapped_column(primary_key=True)
    is_only: Mapped[bool] = mapped_column(server_default="true")
    marked_at: Mapped[datetime | None]
