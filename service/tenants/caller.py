"""Who asks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Scope(StrEnum):
    """What a key may do; none includes another. `admin` is of the key's own tenant: its keys and its audit log."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: every query below a router is scoped to `tenant_id`. `limits` are those that its key has of its own."""

    tenant_id: str
    key_id: str
    scopes: frozenset[Scope] = frozenset()
    limits: Mapping[str, Any] = field(default_factory=dict)
    request_id: str | None = None
