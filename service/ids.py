"""Identifiers: a prefix that names the kind, then 48 bits of time and 80 random bits in hex, so that they sort by age."""

import re
import secrets
import time


def new_id(prefix: str) -> str:
    """`new_id("job")` -> "job_0193...": 32 hex digits after the prefix; later ids compare greater."""
    return f"{prefix}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def is_id(prefix: str, value: str) -> bool:
    """Whether a caller's string can be an id of this kind; PostgreSQL refuses some of those that cannot (NUL)."""
    return re.fullmatch(rf"{prefix}_[0-9a-f]{{32}}", value) is not None
