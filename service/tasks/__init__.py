"""Work that a worker does and that is no job's unit: a small queue beside the ledger's, fenced by `attempt` in the same way.

A task is deleted to cancel it: the worker that does it finds at its next heartbeat that it is gone, and kills its process.
"""

from service.tasks.queue import (
    TaskClaim,
    beat,
    claim_task,
    claimable_count,
    create,
    delete,
    delete_expired,
    expire_leases,
    fail_task,
    finish_task,
    latest,
    newest_of,
    release_task,
)
from service.tasks.tables import Task, TaskState

__all__ = [
    "Task",
    "TaskClaim",
    "TaskState",
    "beat",
    "claim_task",
    "claimable_count",
    "create",
    "delete",
    "delete_expired",
    "expire_leases",
    "fail_task",
    "finish_task",
    "latest",
    "newest_of",
    "release_task",
]
