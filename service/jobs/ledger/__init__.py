"""The job ledger: every state change of jobs and units, in SQL, fenced by `attempt`.

Order of locks, always: the job row, then its units. A claim holds for a lease; a worker that stops beating loses it, and
none of its later writes takes effect. Every change writes its event in the same transaction.
"""

from service.jobs.ledger.claims import beat, claim_unit, claimable_count, create_job, record_event, start_stages
from service.jobs.ledger.outcomes import fail_unit, finish_unit, release_unit, request_cancel, succeed_job
from service.jobs.ledger.rows import (
    Beat,
    Claim,
    LeaseLost,
    NotTerminal,
    Retries,
    UnitSpec,
    add_event,
    lock_claim,
    unit_results,
)
from service.jobs.ledger.sweeps import delete_job, expire_cancels, expire_leases, hold_artifacts

__all__ = [
    "Beat",
    "Claim",
    "LeaseLost",
    "NotTerminal",
    "Retries",
    "UnitSpec",
    "add_event",
    "beat",
    "claim_unit",
    "claimable_count",
    "create_job",
    "delete_job",
    "expire_cancels",
    "expire_leases",
    "fail_unit",
    "finish_unit",
    "hold_artifacts",
    "lock_claim",
    "record_event",
    "release_unit",
    "request_cancel",
    "start_stages",
    "succeed_job",
    "unit_results",
]
