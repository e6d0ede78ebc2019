"""What the requests in progress may hold of each scarce thing: so much in all, and a part of that for one tenant.

A tenant that has used up its part is refused or waits behind itself; what is left is for the others. What is refused at once is
counted over all processes of the API (`peers`), what is waited for in each.
"""

import asyncio
import resource
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from threading import Lock

from service.peers import Alone, Peers
from service.settings import ShareSettings


def allow_open_files() -> None:
    """Raises the process's limit on open files, of which every request in progress needs one, to what the system allows it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # macOS: its real limit is lower
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class UsedUp(Exception):
    """Nothing is free. `of_tenant`: the tenant holds its own part, and others may still go on."""

    def __init__(self, name: str, most: int, *, of_tenant: bool) -> None:
        super().__init__(name)
        self.name, self.most, self.of_tenant = name, most, of_tenant


@dataclass(eq=False, slots=True)
class _Turn:
    """One who waits, in the event loop that made it. `is_given` is written under the share's lock, and decides."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    is_given: bool = False
    woken: asyncio.Future[None] = field(init=False)

    def __post_init__(self) -> None:
        self.woken = self.loop.create_future()

    def give(self) -> None:
        self.is_given = True
        if _running_loop() is self.loop:  # without the detour through the loop's socket that waking from a thread is
            self._wake()
        else:
            self.loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if not self.woken.done():
            self.woken.set_result(None)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:  # in a thread
        return None


class Share:
    """One scarce thing, of which there are `total`, at most `each` for one tenant. Safe to use from any thread and event loop."""

    def __init__(self, name: str, total: int, tenant_fraction: float, peers: Peers | None = None) -> None:
        """`peers`: there are so many for all processes, as far as `taken` is concerned."""
        self.name, self.total, self.peers = name, total, peers
        if peers is not None:
            peers.tell(name, self.by_tenant)
        self.on_change: Callable[[int], object] = int  # told how many are held, whenever that changes
        self.each = max(1, int(total * tenant_fraction))
        self._lock = Lock()
        self.held = 0
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[_Turn]] = {}

    def take(self, tenant: str) -> None:
        """Takes one, which `give_back` returns.

        Raises:
            UsedUp: none is free for this tenant.
        """
        with self._lock:
            if not self._is_free(tenant):
                raise self._used_up(of_tenant=self._has_its_part(tenant))
            self._hold(tenant)

    async def wait(self, tenant: str, seconds: float | None = None, *, is_next: bool = False) -> None:
        """Takes one as soon as it is free for this tenant; of those who wait, a tenant that holds least is next. `is_next`: goes
        before all others of the tenant.

        Raises:
            UsedUp: none has become free within `seconds`.
        """
        with self._lock:
            if self._is_free(tenant):
                return self._hold(tenant)
            turn = _Turn()
            turns = self._waiting.setdefault(tenant, deque())
            if is_next:
                turns.appendleft(turn)
            else:
                turns.append(turn)
        try:
            async with asyncio.timeout(seconds):
                await turn.woken
        except BaseException as error:
            self._leave(tenant, turn)
            if isinstance(error, TimeoutError):
                raise self._used_up(of_tenant=self._has_its_part(tenant)) from None
            raise

    def give_back(self, tenant: str) -> None:
        with self._lock:
            self.held -= 1
            self.on_change(self.held)
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]
            self._pass_on()

    @asynccontextmanager
    async def taken(self, tenant: str) -> AsyncIterator[None]:
        """Holds one; of a share of all processes, as far as the others can be asked.

        Raises:
            UsedUp: none is free for this tenant.
        """
        self.take(tenant)
        try:
            if self.peers is not None:
                await self._agree(self.peers, tenant)
            yield
        finally:
            self.give_back(tenant)
            if self.peers is not None:
                self.peers.gave_back()

    async def _agree(self, peers: Peers, tenant: str) -> None:
        with suppress(Alone):
            if whose := await peers.take(self.name, tenant, self.total, self.each):
                raise self._used_up(of_tenant=whose == "tenant")

    def by_tenant(self) -> dict[str, int]:
        with self._lock:
            return dict(self._held)

    @asynccontextmanager
    async def waited_for(self, tenant: str) -> AsyncIterator[None]:
        """Holds one as soon as it is free for this tenant."""
        await self.wait(tenant)
        try:
            yield
        finally:
            self.give_back(tenant)

    def _is_free(self, tenant: str) -> bool:
        return self.held < self.total and not self._has_its_part(tenant)

    def _has_its_part(self, tenant: str) -> bool:
        return self._held[tenant] >= self.each

    def _hold(self, tenant: str) -> None:
        self.held += 1
        self.on_change(self.held)
        self._held[tenant] += 1

    def _used_up(self, *, of_tenant: bool) -> UsedUp:
        return UsedUp(self.name, self.each if of_tenant else self.total, of_tenant=of_tenant)

    def _pass_on(self) -> None:
        """Gives what is free to those who wait. A tenant that was served goes behind the others that hold as much."""
        while self.held < self.total:
            tenants = [tenant for tenant in self._waiting if self._held[tenant] < self.each]
            if not tenants:
                return
            tenant = min(tenants, key=self._held.__getitem__)
            turns = self._waiting.pop(tenant)
            turn = turns.popleft()
            if turns:
                self._waiting[tenant] = turns
            self._hold(tenant)
            turn.give()

    def _leave(self, tenant: str, turn: _Turn) -> None:
        """For one who waits no longer; what it was given just then goes to the next."""
        with self._lock:
            if not turn.is_given:
                turns = self._waiting[tenant]
                turns.remove(turn)
                if not turns:
                    del self._waiting[tenant]
        if turn.is_given:
            self.give_back(tenant)


READS = 4
WRITES = 4
"""Connections that read and write in the event loop (`db/reader`), which cannot keep more of them busy."""


class Shares:
    """All of them. One waits for a connection, a read, a write, a reader or an encoder, soon free; the others are refused."""

    def __init__(self, settings: ShareSettings, connections: int, peers: Peers | None = None) -> None:
        def share(name: str, total: int, peers: Peers | None = None) -> Share:
            return Share(name, total, settings.tenant_fraction, peers)

        self.streams = share("streams", settings.streams, peers)
        self.waiters = share("waiters", settings.waiters, peers)
        self.downloads = share("downloads", settings.downloads, peers)
        self.uploads = share("uploads", settings.uploads, peers)
        self.readers = share("readers", settings.readers)
        self.connections = share("connections", connections)
        self.reads = share("reads", READS)
        self.writes = share("writes", WRITES)
        # A stream that waits for its client holds one encoded batch; while it is encoded, several times as much.
        self.encoders = share("encoders", 1)

    def __iter__(self) -> Iterator[Share]:
        return iter(vars(self).values())
