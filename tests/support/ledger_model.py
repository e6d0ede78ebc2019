"""What the ledger ought to hold, in plain Python: the model that the state machine of the ledger is compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.ledger import Claim, Retries
from service.ledger.state import TERMINAL, JobStatus, UnitState
from service.plan.stages import Stage, UnitSpec
from support.ledger_world import unit as spec_of

OPEN = (JobStatus.QUEUED, JobStatus.RUNNING)
ORDER = list(Stage)
TOTAL = 100
WAVES = ((Stage.PREPARE, Stage.WARMUP), (Stage.LANDMARK_GRADIENTS, Stage.EMBED), (Stage.SELECT, Stage.VALIDATE))

# As the schema's triggers must enforce them.
JOB_TRANSITIONS = {
    (JobStatus.QUEUED, JobStatus.RUNNING),
    (JobStatus.QUEUED, JobStatus.CANCELLED),
    (JobStatus.QUEUED, JobStatus.FAILED),  # with the import of a dataset that it waited for
    (JobStatus.RUNNING, JobStatus.CANCELLING),
    (JobStatus.RUNNING, JobStatus.CANCELLED),
    (JobStatus.RUNNING, JobStatus.SUCCEEDED),
    (JobStatus.RUNNING, JobStatus.FAILED),
    (JobStatus.CANCELLING, JobStatus.CANCELLED),
}
UNIT_TRANSITIONS = {
    (UnitState.PENDING, UnitState.RUNNING),
    (UnitState.PENDING, UnitState.CANCELLED),
    (UnitState.RUNNING, UnitState.PENDING),
    (UnitState.RUNNING, UnitState.SUCCEEDED),
    (UnitState.RUNNING, UnitState.FAILED),
    (UnitState.RUNNING, UnitState.CANCELLED),
    (UnitState.SUCCEEDED, UnitState.PENDING),
}


@dataclass(eq=False)
class Unit:
    stage: Stage
    shard: int
    key: str
    total: int
    state: UnitState = UnitState.PENDING
    attempt: int = 0
    failures: int = 0
    done: int = 0
    waits: bool = False  # until its `not_before`
    reopened: int = 0
    maker: "Unit | None" = None  # of an artifact that it found missing or damaged, and waits for
    lapsed: bool = False  # its lease has run out, and no sweep has seen it yet
    reasons: list[tuple[int, str]] = field(default_factory=list)  # (attempt, code) of those that failed

    @property
    def place(self) -> tuple[int, int]:
        return ORDER.index(self.stage), self.shard


@dataclass(eq=False)
class Job:
    id: str
    waves: list[Sequence[UnitSpec]]  # still to be started
    first: frozenset[Stage]
    units: list[Unit]
    tenant: int = 0
    status: JobStatus = JobStatus.QUEUED
    overdue: bool = False  # its cancel was asked for longer ago than its workers are given
    deleted: bool = False
    culprit: Unit | None = None

    @property
    def running(self) -> list[Unit]:
        return [unit for unit in self.units if unit.state is UnitState.RUNNING]

    def cancel_units(self, *states: UnitState) -> None:
        for unit in self.units:
            if unit.state in states:
                unit.state = UnitState.CANCELLED

    def end_cancelling(self) -> None:
        if not self.running:
            self.status = JobStatus.CANCELLED


def units_of(specs: Sequence[UnitSpec]) -> list[Unit]:
    return [Unit(spec.stage, spec.shard, spec.artifact_key, spec.total) for spec in specs]


@dataclass(eq=False)
class Held:
    """A claim that a worker was given; `forgotten` where the worker has crashed since."""

    claim: Claim
    job: Job
    unit: Unit
    worker: str
    forgotten: bool = False

    @property
    def is_live(self) -> bool:
        return self.unit.state is UnitState.RUNNING and self.unit.attempt == self.claim.attempt


def waves_of(shape: list[list[str | None]]) -> list[Sequence[UnitSpec]]:
    """The shards of a wave are spread over its two stages."""
    waves: list[Sequence[UnitSpec]] = [
        [spec_of(WAVES[i][n % 2], n // 2, key=key, total=TOTAL) for n, key in enumerate(keys)]
        for i, keys in enumerate(shape)
    ]
    return [*waves, [spec_of(Stage.VALIDATE, total=TOTAL)]]


class Model:
    """Jobs in the order in which they were posted. Each method does what the ledger's function of that name must do."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.turns: dict[int, int] = {}  # by tenant, when its last turn began
        self.now = 0
        self.turns_since = 0  # those that began before are over

    def units(self) -> Iterator[tuple[Job, Unit]]:
        """In the order of their creation in each job."""
        return ((job, unit) for job in self.jobs for unit in job.units)

    def running(self, *, lapsed: bool | None = None) -> list[tuple[Job, Unit]]:
        found = [(job, unit) for job, unit in self.units() if unit.state is UnitState.RUNNING]
        return found if lapsed is None else [(job, unit) for job, unit in found if unit.lapsed is lapsed]

    def submit(self, job_id: str, waves: list[Sequence[UnitSpec]], tenant: int) -> None:
        stages = frozenset(spec.stage for spec in waves[0])
        self.jobs.append(Job(job_id, waves[1:], stages, units_of(waves[0]), tenant))

    def end_turns(self) -> None:
        self.now += 1
        self.turns_since = self.now

    def _is_scheduled(self, tenant: int) -> bool:
        return self.turns.get(tenant, -1) >= self.turns_since

    def _place(self, tenant: int) -> tuple[int, bool, int, int]:
        """In the order of tenants: few running units first, then the one scheduled now, then the one that waits longest."""
        running = sum(job.tenant == tenant for job, _ in self.running())
        return running, not self._is_scheduled(tenant), self.turns.get(tenant, -1), tenant

    def claimable(self) -> list[tuple[Job, Unit]]:
        """What a worker may take now, the first first."""
        being_made = {unit.key for _, unit in self.running()}
        return [
            (job, unit)
            for job in sorted(self.jobs, key=lambda job: self._place(job.tenant))
            if job.status in OPEN
            for unit in sorted(job.units, key=lambda unit: unit.place)
            if unit.state is UnitState.PENDING and not unit.waits and unit.key not in being_made
            if unit.maker is None or unit.maker.state is UnitState.SUCCEEDED
        ]

    def first_claimable(self, held: tuple[Job, Unit] | None = None) -> tuple[Job, Unit] | None:
        """`held` is locked by a claim that is not committed: nothing of its job, and no unit of its artifact, is taken."""
        free = (
            (job, unit)
            for job, unit in self.claimable()
            if held is None or (job is not held[0] and unit.key != held[1].key)
        )
        return next(free, None)

    def claim(self, job: Job, unit: Unit) -> None:
        if not self._is_scheduled(job.tenant):
            self.now += 1
            self.turns[job.tenant] = self.now
        job.status = JobStatus.RUNNING
        unit.state, unit.attempt, unit.done, unit.lapsed = UnitState.RUNNING, unit.attempt + 1, 0, False
        unit.maker = None

    def beat(self, unit: Unit, done: int) -> None:
        unit.lapsed = False
        unit.done = max(unit.done, min(done, unit.total))

    def finish(self, job: Job, unit: Unit) -> bool:
        unit.state, unit.done = UnitState.SUCCEEDED, unit.total
        if job.status is JobStatus.CANCELLING:
            job.end_cancelling()
            return False
        if any(unit.state is not UnitState.SUCCEEDED for unit in job.units):
            return False
        if job.waves:
            job.units += units_of(job.waves.pop(0))
        else:
            job.status = JobStatus.SUCCEEDED
        return True

    def fail(self, job: Job, unit: Unit, code: str, *, retryable: bool, retries: Retries) -> bool:
        unit.failures += 1
        unit.reasons.append((unit.attempt, code))
        if job.status is JobStatus.CANCELLING:
            unit.state = UnitState.CANCELLED
            job.end_cancelling()
            return False
        if retryable and unit.failures < retries.max_attempts:
            unit.state, unit.waits = UnitState.PENDING, retries.seconds > 0
            return True
        unit.state, job.status, job.culprit = UnitState.FAILED, JobStatus.FAILED, unit
        job.cancel_units(UnitState.PENDING, UnitState.RUNNING)
        return False

    def lack(self, job: Job, unit: Unit, key: str, retries: Retries) -> None:
        maker = next((other for other in job.units if other.key == key), None)
        is_final = maker is None or (
            maker.state is UnitState.SUCCEEDED and maker.reopened >= retries.max_attempts - 1 and maker is not unit
        )
        if is_final or maker is unit or job.status is JobStatus.CANCELLING:
            self.fail(job, unit, "artifact_damaged", retryable=not is_final, retries=retries)
            return
        if maker.state is UnitState.SUCCEEDED:
            maker.state, maker.reopened = UnitState.PENDING, maker.reopened + 1
        unit.state, unit.maker = UnitState.PENDING, maker

    def release(self, job: Job, unit: Unit) -> None:
        if job.status is JobStatus.CANCELLING:
            unit.state = UnitState.CANCELLED
            job.end_cancelling()
        else:
            unit.state = UnitState.PENDING

    def cancel(self, job: Job) -> None:
        if job.status not in OPEN:
            return
        job.cancel_units(UnitState.PENDING)
        job.status = JobStatus.CANCELLING
        job.end_cancelling()

    def expire_leases(self, retries: Retries, but: Sequence[Unit] = (), held: Sequence[Job] = ()) -> int:
        """All that have lapsed but those, and but the units of the jobs whose row is held."""
        count = 0
        at_once = Retries(max_attempts=retries.max_attempts, seconds=0)
        for job, unit in self.running(lapsed=True):
            # The failure of one before it may have ended its job.
            if unit.state is UnitState.RUNNING and unit not in but and job not in held:
                self.fail(job, unit, "lease_expired", retryable=True, retries=at_once)
                count += 1
        return count

    def expire_cancels(self, held: Sequence[Job] = ()) -> int:
        due = [j for j in self.jobs if j.status is JobStatus.CANCELLING and j.overdue and j not in held]
        for job in due:
            job.cancel_units(UnitState.RUNNING)
            job.status = JobStatus.CANCELLED
        return len(due)

    def delete(self, job: Job) -> bool:
        """False where it is refused."""
        if job.status not in TERMINAL:
            return False
        job.deleted, job.units = True, []
        return True


@dataclass(eq=False)
class Told:
    """What the events say of a unit."""

    state: UnitState = UnitState.PENDING
    attempt: int = 0
    failures: int = 0


class Replay:
    """A job's status and units as its events tell them. Each event must be possible where it stands."""

    def __init__(self, job: Job) -> None:
        self.status: JobStatus | None = None
        self._stages = set(job.first)
        self._units = {(unit.stage.value, unit.shard): Told() for unit in job.units}

    def units(self) -> dict[tuple[str, int], Told]:
        return self._units

    def read(self, kind: str, data: dict[str, Any]) -> None:
        subject, _, change = kind.partition(".")
        if subject == "job":
            self.status = JobStatus(change)
        elif kind == "stages.started":
            self._stages |= {Stage(stage) for stage in data["stages"]}
        elif kind == "units.cancelled":
            self._cancel_units(data)
        elif subject == "unit":
            self._unit(change, data)

    def _unit(self, change: str, data: dict[str, Any]) -> None:
        unit = self._units[data["stage"], data["shard"]]
        if change == "claimed":
            assert unit.state is UnitState.PENDING, "claimed though not pending"
            assert data["attempt"] == unit.attempt + 1, "an attempt is missing"
            unit.state, unit.attempt = UnitState.RUNNING, data["attempt"]
            return
        if change == "reopened":
            assert unit.state is UnitState.SUCCEEDED, "reopened though not done"
            assert data["attempt"] == unit.attempt, "reopened after another attempt"
            unit.state = UnitState.PENDING
            return
        assert unit.state is UnitState.RUNNING, f"{change} though not running"
        assert data["attempt"] == unit.attempt, f"{change} by another attempt than that which runs"
        if change == "attempt_failed":
            unit.failures += 1
            at_the_end = UnitState.CANCELLED if self.status is JobStatus.CANCELLING else UnitState.FAILED
            unit.state = UnitState.PENDING if data["retried"] else at_the_end
        else:
            unit.state = UnitState.PENDING if change == "released" else UnitState(change)

    def _cancel_units(self, data: dict[str, Any]) -> None:
        """By the deadline the running ones, by the failure of one all others, by a request those that have not begun."""
        failed = any(unit.state is UnitState.FAILED for unit in self._units.values())
        states = {UnitState.RUNNING} if "reason" in data else {UnitState.PENDING}
        states |= {UnitState.RUNNING} if failed else set()
        met = [(p, u) for p, u in self._units.items() if u.state in states and Stage(p[0]) in self._stages]
        assert (len(met), {p[0] for p, _ in met}) == (data["units"], set(data["stages"])), "other units than those"
        for _, unit in met:
            unit.state = UnitState.CANCELLED


def check_events(job: Job, units: dict[tuple[str, int], Any], events: list[tuple[str, dict[str, Any]]]) -> None:
    if job.deleted:
        assert not events
        return
    replay = Replay(job)
    for kind, data in events:
        replay.read(kind, data)
    assert replay.status == job.status
    for place, told in replay.units().items():
        row = units[place]
        assert (told.state, told.attempt, told.failures) == (row.state, row.attempt, row.failures)
