"""The rate of requests of a key, in this process. Health and metrics, which need no key, have none."""

import time
from functools import lru_cache

from fastapi import Request
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from service.errors import TooManyRequests
from service.limits import quotas
from service.settings import ApiSettings
from service.tenants.service import CallerDep

_item = lru_cache(RateLimitItemPerMinute)


class RateLimiter:
    """Counts the requests of each key in a sliding minute: two numbers a key, which go two minutes after its last request."""

    def __init__(self) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def hit(self, key_id: str, per_minute: int) -> None:
        """Counts one request; 0 a minute: no limit.

        Raises:
            TooManyRequests: with the time after which one more fits; it was not counted.
        """
        if not per_minute or self._limiter.hit(_item(per_minute), key_id):
            return
        seconds = self._seconds_until_one_fits(_item(per_minute), key_id)
        raise TooManyRequests(
            f"This key may send {per_minute:,} requests a minute. Send the next one in {seconds} s.",
            code="rate_limited",
            headers={
                "Retry-After": str(seconds),
                "X-RateLimit-Limit": str(per_minute),
                "X-RateLimit-Remaining": "0",
                "X-RateLimit-Reset": str(seconds),
            },
        )

    def used(self, key_id: str, per_minute: int) -> int:
        """Of the last minute."""
        return per_minute - self._limiter.get_window_stats(_item(per_minute), key_id).remaining if per_minute else 0

    def _seconds_until_one_fits(self, item: RateLimitItem, key_id: str) -> int:
        """Whole seconds, rounded up past the moment: at the moment itself it does not fit yet, and that is known to a hair."""
        return max(1, int(self._limiter.get_window_stats(item, key_id).reset_time - time.time() + 0.01) + 1)


async def limit_rate(request: Request, caller: CallerDep) -> None:  # async: a thread would cost more than it does
    """A dependency of all routes that need a key."""
    settings: ApiSettings = request.app.state.settings
    request.app.state.rate.hit(caller.key_id, quotas.of_key(caller, settings.limits).requests_per_minute)
