"""The job quotas of a key: open jobs, and samples in 24 hours."""

import math
from datetime import UTC, datetime

from sqlalchemy.orm import Session

from service.auth import quotas
from service.auth.principal import Principal
from service.auth.quotas import QuotaExceeded
from service.jobs import repository
from service.settings import LimitSettings

_RETRY_SECONDS = "60"  # when a job will end is unknown


def check(session: Session, principal: Principal, settings: LimitSettings, samples: int) -> None:
    """Checks the quotas for a job of `samples` rows of pool and target; locks the key's quota until the transaction ends.

    Raises:
        QuotaExceeded: `param` names the quota.
    """
    limits = quotas.limits_of(principal, settings)
    quotas.lock(session, principal.key_id, "jobs")
    open_jobs = repository.open_jobs(session, principal.tenant_id, principal.key_id) if limits.concurrent_jobs else 0
    if limits.concurrent_jobs and open_jobs >= limits.concurrent_jobs:
        raise QuotaExceeded(
            f"This key has {limits.concurrent_jobs:,} unfinished jobs, which is its limit."
            " Wait until one ends, or cancel one.",
            param="concurrent_jobs",
            headers={"Retry-After": _RETRY_SECONDS},
        )
    if limits.samples_per_day:
        _check_samples(session, principal.key_id, limits.samples_per_day, samples)


def check_samples_of_started(session: Session, principal: Principal, settings: LimitSettings, samples: int) -> None:
    """The quota of samples alone, for a job that waited for the rows that are counted now, and has been counted itself.

    Raises:
        QuotaExceeded: it is used up.
    """
    limit = quotas.limits_of(principal, settings).samples_per_day
    quotas.lock(session, principal.key_id, "jobs")
    if limit and (used := repository.samples_today(session, principal.key_id)) > limit:
        raise _too_many_samples(f"this key has used {used:,} of its {limit:,} per 24 hours with it.", samples, None)


def _check_samples(session: Session, key_id: str, limit: int, samples: int) -> None:
    if samples > limit:
        raise _too_many_samples(f"a job of this key may have at most {limit:,}. Use a smaller pool.", samples, None)
    used = repository.samples_today(session, key_id)
    if used + samples <= limit:
        return
    until = repository.samples_leave_at(session, key_id, room=limit - samples)
    if until is not None:  # else the last one has left the 24 hours just now
        reason = f"this key has used {used:,} of its {limit:,} per 24 hours. Wait until {until:%Y-%m-%d %H:%M} UTC."
        raise _too_many_samples(reason, samples, until)


def _too_many_samples(reason: str, samples: int, until: datetime | None) -> QuotaExceeded:
    seconds = None if until is None else max(1, math.ceil((until - datetime.now(UTC)).total_seconds()))
    return QuotaExceeded(
        f"The job has {samples:,} samples (rows of pool and target), and {reason}",
        param="samples_per_day",
        headers=None if seconds is None else {"Retry-After": str(seconds)},
        retry=seconds is not None,
    )
