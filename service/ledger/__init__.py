"""The job ledger: every state change of jobs and units, in SQL, fenced by `attempt`.

Order of locks, always: the job row, then its units. A claim holds for a lease; a worker that stops beating loses it, and
none of its later writes takes effect. Every change writes its event in the same transaction.
"""

from service.ledger.claims import (
    add_plan,
    beat,
    claim_unit,
    claimable_count,
    record_event,
    start_stages,
    write_plans,
)
from service.ledger.lookup import find_job, require_job
from service.ledger.outcomes import (
    fail_unit,
    fail_waiting,
    finish_unit,
    release_unit,
    remake_artifact,
    request_cancel,
    start_waiting,
    succeed_job,
)
from service.ledger.rows import (
    Beat,
    Claim,
    Lack,
    LeaseLost,
    NotTerminal,
    Retries,
    add_event,
    last_result,
    lock_claim,
    lock_job,
    unit_results,
)
from service.ledger.sweeps import delete_job, expire_cancels, expire_leases, lock_artifacts
from service.ledger.unable import end_undoable

__all__ = [
    "Beat",
    "Claim",
    "Lack",
    "LeaseLost",
    "NotTerminal",
    "Retries",
    "add_event",
    "add_plan",
    "beat",
    "claim_unit",
    "claimable_count",
    "delete_job",
    "end_undoable",
    "expire_cancels",
    "expire_leases",
    "fail_unit",
    "fail_waiting",
    "find_job",
    "finish_unit",
    "last_result",
    "lock_artifacts",
    "lock_claim",
    "lock_job",
    "record_event",
    "release_unit",
    "remake_artifact",
    "request_cancel",
    "require_job",
    "start_stages",
    "start_waiting",
    "succeed_job",
    "unit_results",
    "write_plans",
]
