"""Quotas of a key. Each domain counts what it stores, in the transaction that adds to it."""

from sqlalchemy.orm import Session

from service.auth.principal import Principal
from service.db.locks import advisory_lock
from service.http.errors import TooManyRequests
from service.settings import LimitSettings


class QuotaExceeded(TooManyRequests):
    code = "quota_exceeded"


def limits_of(principal: Principal, settings: LimitSettings) -> LimitSettings:
    """The limits of the principal's key: its own, otherwise those of the settings."""
    own = {name: value for name, value in principal.limits.items() if name in LimitSettings.model_fields}
    return settings.model_copy(update=own)


def lock(session: Session, key_id: str, quota: str) -> None:
    """Serialises transactions that count this quota of the key, so that each sees what the one before created."""
    advisory_lock(session, f"quotas/{quota}/{key_id}")
