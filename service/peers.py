"""What the processes of the API count together, in the Redis of the broker. While that is away each counts for itself.

No request waits for it longer than a moment: the first that gets no answer makes this process count alone, and those that follow
do not ask. A task looks whether it is back, and publishes anew what this process holds.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar
from uuid import uuid4

from redis import DriverInfo
from redis.asyncio import BlockingConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_WAIT_SECONDS = 0.25
_AGAIN_SECONDS = 2.0  # between looks whether it is back
_BEAT_SECONDS = 5.0  # after which what is held is published again
_FORGET_SECONDS = 15  # after which a process that has published nothing holds nothing
_SOON_SECONDS = 0.1  # in which what is given back gathers

_IN_ALL = ""  # beside the tenants, none of which is called so

# KEYS: the set of the processes that hold something of a share, each of which has a hash with what it holds under the name of
# the set, a colon and its own. ARGV: this process, the tenant, what it would then hold in all and of the tenant, the most of
# both, and the seconds to forget after. Nothing changes where it is refused.
_TAKE = """
local in_all, of_tenant = tonumber(ARGV[3]), tonumber(ARGV[4])
for _, process in ipairs(redis.call('SMEMBERS', KEYS[1])) do
    if process ~= ARGV[1] then
        local held = redis.call('HMGET', KEYS[1] .. ':' .. process, '', ARGV[2])
        if held[1] then
            in_all = in_all + tonumber(held[1])
            of_tenant = of_tenant + tonumber(held[2] or 0)
        else
            redis.call('SREM', KEYS[1], process)
        end
    end
end
if of_tenant > tonumber(ARGV[6]) then return 'tenant' end
if in_all > tonumber(ARGV[5]) then return 'all' end
local own = KEYS[1] .. ':' .. ARGV[1]
redis.call('HSET', own, '', ARGV[3], ARGV[2], ARGV[4])
redis.call('EXPIRE', own, ARGV[7])
redis.call('SADD', KEYS[1], ARGV[1])
return ''
"""


class Alone(Exception):
    """The others cannot be asked now."""


class Peers:
    """Of one event loop: the one that opened it; in another, there are none."""

    def __init__(self, url: str) -> None:
        self.on_alone: Callable[[bool], object] = bool  # told when it begins to count alone, and when it ends
        self.connections: BlockingConnectionPool = BlockingConnectionPool.from_url(
            url,
            max_connections=4,
            timeout=_WAIT_SECONDS,
            socket_timeout=_WAIT_SECONDS,
            socket_connect_timeout=_WAIT_SECONDS,
            retry=Retry(NoBackoff(), 1),  # of a connection that was closed meanwhile
            protocol=2,
            driver_info=DriverInfo(),  # made here: each connection would read the version of the library from a file
        )
        self._redis: Redis = Redis(connection_pool=self.connections)
        self._take = self._redis.register_script(_TAKE)
        self._process = uuid4().hex
        self._held: dict[str, Callable[[], Mapping[str, int]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_alone: bool | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()  # no older state is published after a newer one

    def tell(self, share: str, held: Callable[[], Mapping[str, int]]) -> None:
        """From now on the others know what this process holds of the share: how much, by tenant."""
        self._held[share] = held

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        with suppress(Alone):
            await self._publish()
        self._task = asyncio.create_task(self._keep_up())

    async def close(self) -> None:
        """The others forget this process at once, where they can be told."""
        while self._task is not None and not self._task.done():  # a client of Redis may swallow a cancellation
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=0.1)
        with suppress(Alone):
            await self.ask(lambda: self._redis.delete(*map(self._key, self._held)))
        self._loop = None
        await self._redis.aclose()
        await self.connections.aclose()

    @property
    def can_be_asked(self) -> bool:
        return self._is_alone is False and self._loop is asyncio.get_running_loop()

    async def ask(self, command: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer of Redis.

        Raises:
            Alone: there is none in time, or there was none a moment ago.
        """
        if not self.can_be_asked:
            raise Alone
        return await self._ask(command)

    async def take(self, share: str, tenant: str, total: int, each: int) -> str:
        """Whether this process may hold what it holds of the share: an empty text, or, where there is not so much, whose part is
        used up: `tenant` or `all`.

        Raises:
            Alone: nobody knows.
        """
        if not self.can_be_asked:
            raise Alone
        async with self._turn:
            held = self._held[share]()
            numbers = (sum(held.values()), held.get(tenant, 0), total, each, _FORGET_SECONDS)
            found: bytes = await self.ask(lambda: self._take([_set(share)], [self._process, tenant, *numbers]))
        return found.decode()

    def gave_back(self) -> None:
        """In the loop, or in a thread of its own."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it has been closed
                self._loop.call_soon_threadsafe(self._changed.set)

    async def _keep_up(self) -> None:
        while True:
            with suppress(Alone):
                if self._is_alone:
                    await asyncio.sleep(_AGAIN_SECONDS)
                else:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_BEAT_SECONDS):
                            await self._changed.wait()
                            await asyncio.sleep(_SOON_SECONDS)
                self._changed.clear()
                await self._publish()

    async def _publish(self) -> None:
        """All that is held, also where it was away a moment ago."""
        async with self._turn:
            pipe = self._redis.pipeline(transaction=True)
            pipe.ping()
            for share, of_share in self._held.items():
                held, key = of_share(), self._key(share)
                pipe.delete(key)
                if held:
                    counts: dict[Any, Any] = {_IN_ALL: sum(held.values()), **held}
                    pipe.hset(key, mapping=counts)
                    pipe.expire(key, _FORGET_SECONDS)
                    pipe.sadd(_set(share), self._process)
            await self._ask(pipe.execute)

    def _key(self, share: str) -> str:
        return f"{_set(share)}:{self._process}"

    async def _ask(self, command: Callable[[], Awaitable[Answer]]) -> Answer:
        try:
            async with asyncio.timeout(2 * _WAIT_SECONDS):
                answer = await command()
        except (RedisError, OSError) as error:  # as is a timeout
            self._set_alone(True, type(error).__name__)
            raise Alone from error
        self._set_alone(False)
        return answer

    def _set_alone(self, is_alone: bool, why: str = "") -> None:
        if is_alone is self._is_alone:
            return
        if is_alone:
            log.warning("the broker is away (%s): rates and shares are counted in each API process for itself", why)
        elif self._is_alone is not None:
            log.info("the broker is back: rates and shares are counted over all API processes")
        self._is_alone = is_alone
        self.on_alone(is_alone)


def _set(share: str) -> str:
    return f"winnow:held:{share}"
