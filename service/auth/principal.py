"""Who sends a request, and what they may do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Scope(StrEnum):
    """What a key may do; no scope includes another. `admin` covers the keys and the audit log of the key's own tenant."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """The tenant and key of a request. Every query below a router is scoped to `tenant_id`; `limits` are the key's own; `browser`
    is the digest of the session by which a page was asked for."""

    tenant_id: str
    key_id: str
    scopes: frozenset[Scope] = frozenset()
    limits: Mapping[str, Any] = field(default_factory=dict)
    request_id: str | None = None
    browser: bytes | None = field(default=None, repr=False)
