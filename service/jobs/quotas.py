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


def refused(
    session: Session, principal: Principal, settings: LimitSettings, quota: str, samples: int
) -> QuotaExceeded | None:
    """Why a job of `samples` rows of pool and target was refused for that quota; None: there is room by now."""
    limits = quotas.limits_of(principal, settings)
    if quota == "concurrent_jobs":
        return QuotaExceeded(
            f"This key has {limits.concurrent_jobs:,} unfinished jobs, which is its limit."
            " Wait until one ends, or cancel one.",
            param="concurrent_jobs",
            headers={"Retry-After": _RETRY_SECONDS},
        )
    limit = limits.samples_per_day
    if samples > limit:
        return _too_many_samples(f"a job of this key may have at most {limit:,}. Use a smaller pool.", samples, None)
    _, used = repository.usage(session, principal.key_id)
    until = repository.samples_leave_at(session, principal.key_id, room=limit - samples)
    if until is None:  # the last one has left the 24 hours just now
        return None
    reason = f"this key has used {used:,} of its {limit:,} per 24 hours. Wait until {until:%Y-%m-%d %H:%M} UTC."
    return _too_many_samples(reason, samples, until)


def check_samples_of_started(session: Session, principal: Principal, settings: LimitSettings, samples: int) -> None:
    """The quota of samples alone, for a job that waited for the rows that are counted now, and has been counted itself.

    Raises:
        QuotaExceeded: it is used up.
    """
    limit = quotas.limits_of(principal, settings).samples_per_day
    if not limit:
        return
    _, used = repository.usage(session, principal.key_id)
    if used > limit:
        raise _too_many_samples(f"this key has used {used:,} of its {limit:,} per 24 hours with it.", samples, None)


def _too_many_samples(reason: str, samples: int, until: datetime | None) -> QuotaExceeded:
    seconds = None if until is None else max(1, math.ceil((until - datetime.now(UTC)).total_seconds()))
    return QuotaExceeded(
        f"The job has {samples:,} samples (rows of pool and target), and {reason}",
        param="samples_per_day",
        headers=None if seconds is None else {"Retry-After": str(seconds)},
        retry=seconds is not None,
    )
