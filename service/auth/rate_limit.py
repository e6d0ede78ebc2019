"""Rate limits per key, over all processes of the API. Health and metrics, which need no key, have none."""

import asyncio
import time
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter as SharedLimiter
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from service.http.errors import TooManyRequests
from service.peers import Alone, Peers

_KEPT_SECONDS = 20.0
_LARGEST = 100  # of a limit, the part that a process takes at once at most
_REFUSED_SECONDS = 1.0
_MOST_KEYS = 10_000

_item = lru_cache(RateLimitItemPerMinute)


@dataclass(slots=True)
class _Allowance:
    """Requests of a key that were counted for all processes, and that this one may answer without asking again, for a while."""

    left: int = 0
    size: int = 0
    until: float = 0.0
    refused_until: float = 0.0
    refused: TooManyRequests | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def spend(self, now: float) -> bool:
        """
        Raises:
            TooManyRequests: the key was told so a moment ago.
        """
        if now < self.refused_until and self.refused is not None:
            raise self.refused
        if self.left == 0 or now >= self.until:
            return False
        self.left -= 1
        return True

    def unspent(self, now: float) -> int:
        return self.left if now < self.until else 0

    def take(self, size: int, now: float) -> None:
        """Of which one is spent at once."""
        self.left, self.size, self.until = size - 1, size, now + _KEPT_SECONDS


class Rates:
    """Counts the requests of each key in a sliding minute, in Redis. A busy key's are counted ahead, twice as many each time and
    at most a hundredth of its limit, so that most of them cost no round trip. Where Redis is away, in this process."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        options: dict[str, Any] = {"connection_pool": peers.connections}  # which knows the address
        storage = RedisStorage("async+redis://", implementation="redispy", key_prefix="winnow:rates", **options)
        self._limiter = SharedLimiter(storage)
        self._alone = RateLimiter()
        self._allowances: dict[tuple[str, int], _Allowance] = {}

    async def hit(self, key_id: str, per_minute: int) -> None:
        """Counts one request; 0 a minute: no limit.

        Raises:
            TooManyRequests: the request was not counted; the headers say when the next one fits.
        """
        if not per_minute:
            return None
        if not self._peers.can_be_asked:
            return self._alone.hit(key_id, per_minute)
        allowance = self._allowance(key_id, per_minute)
        now = asyncio.get_running_loop().time()
        if allowance.spend(now):
            return None
        try:
            async with allowance.turn:  # those that came meanwhile spend what one of them has taken
                if not allowance.spend(now):
                    await self._take(allowance, key_id, per_minute)
        except Alone:
            self._alone.hit(key_id, per_minute)

    async def _take(self, allowance: _Allowance, key_id: str, per_minute: int) -> None:
        loop, item = asyncio.get_running_loop(), _item(per_minute)
        largest = max(1, per_minute // _LARGEST)
        size = min(2 * allowance.size, largest) if loop.time() < allowance.until else 1
        for cost in dict.fromkeys((size, 1)):
            if await self._peers.ask(partial(self._limiter.hit, item, key_id, cost=cost)):
                return allowance.take(cost, loop.time())
        stats = await self._peers.ask(partial(self._limiter.get_window_stats, item, key_id))
        allowance.refused = _refusal(per_minute, stats.reset_time)
        allowance.refused_until = loop.time() + min(_REFUSED_SECONDS, max(0.0, stats.reset_time - time.time()))
        raise allowance.refused

    async def used(self, key_id: str, per_minute: int) -> int:
        """Of the last minute; with what other processes have counted ahead."""
        if not per_minute:
            return 0
        try:
            stats = await self._peers.ask(partial(self._limiter.get_window_stats, _item(per_minute), key_id))
        except Alone:
            return self._alone.used(key_id, per_minute)
        ahead = self._allowance(key_id, per_minute).unspent(asyncio.get_running_loop().time())
        return per_minute - stats.remaining - ahead

    def _allowance(self, key_id: str, per_minute: int) -> _Allowance:
        if len(self._allowances) >= _MOST_KEYS:
            self._allowances.clear()
        return self._allowances.setdefault((key_id, per_minute), _Allowance())


class RateLimiter:
    """In this process alone: two counters per key, which expire two minutes after its last request."""

    def __init__(self) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def hit(self, key_id: str, per_minute: int) -> None:
        """Counts one request; 0 a minute: no limit.

        Raises:
            TooManyRequests: the request was not counted; the headers say when the next one fits.
        """
        if not per_minute or self._limiter.hit(_item(per_minute), key_id):
            return
        raise _refusal(per_minute, self._limiter.get_window_stats(_item(per_minute), key_id).reset_time)

    def used(self, key_id: str, per_minute: int) -> int:
        """Of the last minute."""
        return per_minute - self._limiter.get_window_stats(_item(per_minute), key_id).remaining if per_minute else 0


def _refusal(per_minute: int, reset_time: float) -> TooManyRequests:
    # Rounded up by at least a second: at the reset time itself the request would still be refused.
    seconds = max(1, int(reset_time - time.time() + 0.01) + 1)
    return TooManyRequests(
        f"This key may send {per_minute:,} requests a minute. Send the next one in {seconds} s.",
        code="rate_limited",
        headers={
            "Retry-After": str(seconds),
            "X-RateLimit-Limit": str(per_minute),
            "X-RateLimit-Remaining": "0",
            "X-RateLimit-Reset": str(seconds),
        },
    )
