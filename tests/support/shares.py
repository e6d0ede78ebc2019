"""What tests hold of what requests share."""

from collections.abc import Iterator
from contextlib import contextmanager

from service.shares import Share


@contextmanager
def holding(share: Share, tenant: str) -> Iterator[None]:
    """One of it, in this process alone."""
    share.take(tenant)
    try:
        yield
    finally:
        share.give_back(tenant)
