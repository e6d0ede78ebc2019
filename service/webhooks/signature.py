"""Secrets and signatures of Standard Webhooks (standardwebhooks.com): HMAC-SHA256, version v1."""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterable

_PREFIX = "whsec_"


def new_secret() -> bytes:
    return secrets.token_bytes(32)


def shown(secret: bytes) -> str:
    """As the owner of an endpoint gives it to a library that verifies."""
    return _PREFIX + base64.b64encode(secret).decode()


def headers(keys: Iterable[bytes], message_id: str, timestamp: int, payload: bytes) -> dict[str, str]:
    """The headers of one attempt at `timestamp` (seconds since 1970); a signature for each key, any of which may be verified."""
    signed = f"{message_id}.{timestamp}.".encode() + payload
    digests = (base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode() for key in keys)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{digest}" for digest in digests),
    }
