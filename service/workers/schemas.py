"""Workers as the client sees them."""

from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.http.pagination import Page
from service.plan.stages import Stage


class WorkerState(StrEnum):
    BUSY = "busy"
    IDLE = "idle"
    UNABLE = "unable"
    SILENT = "silent"


class WorkerUnit(BaseModel):
    """A unit of a job at work."""

    model_config = ConfigDict(from_attributes=True)

    job_id: str = Field(examples=["job_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    stage: Stage
    shard: int = Field(examples=[3])
    attempt: int = Field(examples=[1])
    done: int = Field(description="Samples, as of its last heartbeat", examples=[1200])
    total: int = Field(examples=[4096])
    started_at: datetime


class WorkerTask(BaseModel):
    """What a worker does beside jobs."""

    kind: str = Field(examples=["import_dataset"])
    subject: str = Field(description="What it is for", examples=["ds_0193a1b2c3d4e5f60718293a4b5c6d7e"])
    started_at: datetime


class WorkerOut(BaseModel):
    """A worker; it serves all tenants. What it does for another tenant is not shown: it is `busy`, and that is all."""

    model_config = ConfigDict(from_attributes=True)

    object: Literal["worker"] = "worker"
    id: str = Field(description="Host and process", examples=["gpu-3:4711"])
    state: WorkerState = Field(
        description="`unable`: it takes no work, `problems` say why; `silent`: no heartbeat for a lease, so it loses its unit"
    )
    version: str = Field(description="Of what computes")
    device: str | None = Field(description="null: it has not started its compute process yet", examples=["cuda:0"])
    memory_bytes: int | None = Field(description="Of the device", examples=[85899345920])
    matmul_rates: dict[str, float] | None = Field(
        description="Operations a second that it measured, by dtype", examples=[{"float32": 6.1e10}]
    )
    unit: WorkerUnit | None = Field(description="Of your tenant's jobs; null: none")
    task: WorkerTask | None = Field(description="Of your tenant's; null: none")
    problems: list[str] = Field(description="What it lacks, for any work or for open jobs of yours")
    started_at: datetime
    seen_at: datetime = Field(description="Its last heartbeat")


class WorkerPage(Page[WorkerOut]):
    """Workers by id."""


def shown(row: Any) -> WorkerOut:
    """A row of the repository."""
    if not row.is_alive:
        state = WorkerState.SILENT
    elif row.is_unable:
        state = WorkerState.UNABLE
    else:
        state = WorkerState.BUSY if row.is_busy else WorkerState.IDLE
    return WorkerOut.model_validate({**row._mapping, "state": state})
