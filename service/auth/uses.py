"""Which request records that a key is used, where that is due."""

import time

_AGAIN_SECONDS = 1.0
_MOST = 10_000


class Uses:
    """To record a use takes the long way, and until that is done all requests of the key would take it: hundreds, of a busy key.
    So one does, and another a second later where that has not helped. Of one event loop."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}

    def is_mine(self, key_id: str) -> bool:
        """Whether the request that asks is the one."""
        now = time.monotonic()
        if now < self._next.get(key_id, 0.0):
            return False
        if len(self._next) >= _MOST:
            self._next.clear()
        self._next[key_id] = now + _AGAIN_SECONDS
        return True
