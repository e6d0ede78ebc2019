"""Rate limits per key, in this process. Health and metrics, which need no key, have none."""

import time
from functools import lru_cache

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from service.http.errors import TooManyRequests

_item = lru_cache(RateLimitItemPerMinute)


class RateLimiter:
    """Counts the requests of each key in a sliding minute: two counters per key, which expire two minutes after its last one."""

    def __init__(self) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def hit(self, key_id: str, per_minute: int) -> None:
        """Counts one request; 0 a minute: no limit.

        Raises:
            TooManyRequests: the request was not counted; the headers say when the next one fits.
        """
        if not per_minute or self._limiter.hit(_item(per_minute), key_id):
            return
        reset_time = self._limiter.get_window_stats(_item(per_minute), key_id).reset_time
        # Rounded up by at least a second: at the reset time itself the request would still be refused.
        seconds = max(1, int(reset_time - time.time() + 0.01) + 1)
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
