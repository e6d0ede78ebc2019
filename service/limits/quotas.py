"""Quotas: how much a key may have made. Checked in the transaction that makes it, one at a time for each key and quota."""

import math
from datetime import UTC, datetime

from sqlalchemy.orm import Session

from service.errors import TooManyRequests
from service.limits import repository
from service.settings import LimitSettings
from service.tenants.caller import Caller

CODE = "quota_exceeded"
_LOOK_AGAIN_SECONDS = "60"  # for a job to end: nobody knows when


def of_key(caller: Caller, settings: LimitSettings) -> LimitSettings:
    """The limits of the caller's key: those of the settings, but for its own."""
    own = {name: value for name, value in caller.limits.items() if name in LimitSettings.model_fields}
    return settings.model_copy(update=own)


def check_job(session: Session, caller: Caller, settings: LimitSettings, samples: int) -> None:
    """Whether the key may make a job of so many samples (rows of pool and target); until the transaction ends no other one may.

    Raises:
        TooManyRequests: it may not now; `param` names the quota.
    """
    limits = of_key(caller, settings)
    repository.lock(session, caller.key_id, "jobs")
    open_jobs = repository.open_jobs(session, caller.tenant_id, caller.key_id) if limits.concurrent_jobs else 0
    if limits.concurrent_jobs and open_jobs >= limits.concurrent_jobs:
        raise TooManyRequests(
            f"This key has {limits.concurrent_jobs:,} jobs that have not ended, which is its limit."
            " Wait for the end of one, or cancel one.",
            param="concurrent_jobs",
            code=CODE,
            headers={"Retry-After": _LOOK_AGAIN_SECONDS},
        )
    if limits.samples_per_day:
        _check_samples(session, caller.key_id, limits.samples_per_day, samples)


def _check_samples(session: Session, key_id: str, limit: int, samples: int) -> None:
    if samples > limit:
        raise _too_many_samples(f"one job of this key may have {limit:,}. Use a smaller pool.", samples, None)
    used, until = repository.samples_today(session, key_id, room=limit - samples)
    if until is not None:
        told = f"this key has used {used:,} of its {limit:,} in 24 hours. Wait until {until:%Y-%m-%d %H:%M} UTC."
        raise _too_many_samples(told, samples, until)


def _too_many_samples(told: str, samples: int, until: datetime | None) -> TooManyRequests:
    seconds = None if until is None else max(1, math.ceil((until - datetime.now(UTC)).total_seconds()))
    return TooManyRequests(
        f"The job has {samples:,} samples (rows of pool and target), and {told}",
        param="samples_per_day",
        code=CODE,
        headers=None if seconds is None else {"Retry-After": str(seconds)},
        retry=seconds is not None,
    )


def check_stored(session: Session, caller: Caller, settings: LimitSettings, adding: int) -> None:
    """Whether the key may store so many bytes more; until the transaction ends no other one of the key may store any.

    Raises:
        TooManyRequests: it may not before something is deleted.
    """
    limit = of_key(caller, settings).stored_bytes
    if not limit:
        return
    repository.lock(session, caller.key_id, "bytes")
    used = repository.stored_bytes(session, caller.key_id)
    if used + adding > limit:
        raise TooManyRequests(
            f"The datasets of this key have {used:,} bytes of rows; {adding:,} more would be over its limit of {limit:,}."
            " Delete datasets that are no longer needed.",
            param="stored_bytes",
            code=CODE,
            retry=False,
        )
