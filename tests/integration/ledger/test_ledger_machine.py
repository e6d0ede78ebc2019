"""Random histories of the job ledger on a real PostgreSQL, step by step beside a model of what it ought to hold.

Two workers and two dispatchers; where two transactions interleave, one thread holds both sessions, and a lock that is waited for
is an error. LEDGER_EXAMPLES asks for more histories than the suite has time for.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import text
from support.ledger_model import OPEN, TOTAL, Held, Job, Model, Unit, check_events, waves_of
from support.ledger_world import LedgerWorld, ledger_world, new_owner

from service import ledger
from service.ledger import Claim, LeaseLost, NotTerminal, Retries, claims, sweeps
from service.ledger.state import TERMINAL, JobStatus, UnitState

EXAMPLES = int(os.environ.get("LEDGER_EXAMPLES", "40"))
STEPS = 40
AT_ONCE = Retries(max_attempts=2, seconds=0)
LATER = Retries(max_attempts=2, seconds=3600)

keys = st.sampled_from([None, None, "shared/0", "shared/1"])  # None: of this unit alone
# For each wave but the last the artifact keys of its units; the last is `validate`.
shapes = st.lists(st.lists(keys, min_size=1, max_size=3), max_size=2)
workers = st.sampled_from("ab")
tenants = st.integers(0, 2)
# Taken modulo the number of what there is to choose from.
picks = st.integers(0, 5)


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self, world: LedgerWorld, owners: Sequence[dict[str, str]]) -> None:
        super().__init__()
        world.empty()
        self.world, self.owners = world, owners
        self.model = Model()
        self.claims: list[Held] = []
        self.ended: dict[str, Any] = {}  # what was seen of jobs when they had ended
        self.progress: Counter[tuple[int, int]] = Counter()  # by unit and attempt

    def live(self) -> list[Held]:
        return [held for held in self.claims if held.is_live and not held.forgotten]

    def lost(self) -> list[Held]:
        """Those first whose unit runs under another claim now."""
        lost = [held for held in self.claims if not held.is_live]
        return sorted(lost, key=lambda held: held.unit.state is not UnitState.RUNNING)

    # Jobs

    @precondition(lambda self: sum(job.status not in TERMINAL for job in self.model.jobs) < 4)
    @rule(posted=st.lists(st.tuples(tenants, shapes), min_size=1, max_size=2))
    def submit(self, posted: list[tuple[int, list[list[str | None]]]]) -> None:
        for tenant, shape in posted:
            waves = waves_of(shape)
            self.model.submit(self.world.job(*waves[0], owner=self.owners[tenant]), waves, tenant)

    @precondition(lambda self: self.model.jobs)
    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        by_work = sorted(self.model.jobs, key=lambda job: -len(job.running))
        job = by_work[pick % len(by_work)]
        self.world.cancel(job.id)
        self.model.cancel(job)

    @precondition(lambda self: self.model.jobs)
    @rule(pick=picks)
    def delete(self, pick: int) -> None:
        job = self.model.jobs[pick % len(self.model.jobs)]
        if self.model.delete(job):
            self.world.delete(job.id)
            before = self.world.image()
            self.world.delete(job.id)
        else:
            before = self.world.image()
            with pytest.raises(NotTerminal):
                self.world.delete(job.id)
        assert self.world.image() == before

    # Workers

    def _claimed(self, claim: Claim | None, worker: str, expected: tuple[Job, Unit] | None) -> None:
        assert (claim is None) == (expected is None), f"{claim} instead of {expected}"
        if claim is not None and expected is not None:
            job, unit = expected
            self.model.claim(job, unit)
            assert (claim.job_id, claim.stage, claim.shard) == (job.id, unit.stage, unit.shard)
            assert (claim.attempt, claim.artifact_key, claim.total) == (unit.attempt, unit.key, unit.total)
            self.claims.append(Held(claim, job, unit, worker))

    def _claim(self, worker: str) -> None:
        self._claimed(self.world.try_claim(worker), worker, self.model.first_claimable())

    @rule(worker=workers, times=st.integers(1, 3))
    def claim(self, worker: str, times: int) -> None:
        assert self.world.claimable_count() == len(self.model.claimable())
        for _ in range(times):
            self._claim(worker)

    @precondition(lambda self: self.model.claimable())
    @rule()
    def redeliver(self) -> None:
        """The same message to both workers: one has found a unit, and the other claims before the first one has committed."""
        real, first = claims.take, self.model.first_claimable()
        overtaken: list[bool] = []

        def take(*arguments: Any) -> Claim | None:
            if not overtaken:
                overtaken.append(True)
                free = self.model.first_claimable(held=first)
                self._claimed(self.world.try_claim("a"), "a", free)
            return real(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(claims, "take", take)
            patch.setattr(claims, "_BUSY_SECONDS", 0)
            claim = self.world.try_claim("b")
        self._claimed(claim, "b", first)

    @precondition(lambda self: self.live())
    @rule(pick=picks, done=st.integers(0, TOTAL + 20))
    def beat(self, pick: int, done: int) -> None:
        held = self.live()[pick % len(self.live())]
        assert self.world.beat(held.claim, done).cancelling is (held.job.status is JobStatus.CANCELLING)
        self.model.beat(held.unit, done)

    def _finish(self, held: Held) -> None:
        then = held.job.waves[0] if held.job.waves else ()
        assert self.world.finish(held.claim, then=then) is self.model.finish(held.job, held.unit)

    @precondition(lambda self: self.live())
    @rule(pick=picks, times=st.integers(1, 3))
    def finish(self, pick: int, times: int) -> None:
        for _ in range(min(times, len(self.live()))):
            self._finish(self.live()[pick % len(self.live())])

    @precondition(lambda self: self.live())
    @rule(pick=picks, retryable=st.booleans(), retries=st.sampled_from([AT_ONCE, LATER]))
    def fail(self, pick: int, retryable: bool, retries: Retries) -> None:
        held = self.live()[pick % len(self.live())]
        again = self.world.fail(held.claim, retryable=retryable, retries=retries)
        assert again is self.model.fail(held.job, held.unit, "broken", retryable=retryable, retries=retries)

    @precondition(lambda self: self.live())
    @rule(pick=picks, lacks=picks)
    def lack(self, pick: int, lacks: int) -> None:
        """An artifact of the job is damaged, its own perhaps, or one that none of its units makes."""
        held = self.live()[pick % len(self.live())]
        key = [*(unit.key for unit in held.job.units), "none"][lacks % (len(held.job.units) + 1)]
        self.world.lack(held.claim, key, AT_ONCE)
        self.model.lack(held.job, held.unit, key, AT_ONCE)

    def _release(self, held: Held) -> None:
        self.world.release(held.claim)
        self.model.release(held.job, held.unit)

    @precondition(lambda self: self.live())
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        self._release(self.live()[pick % len(self.live())])

    @precondition(lambda self: self.live())
    @rule(pick=picks, end=st.sampled_from(["finish", "release"]))
    def end_while_cancelling(self, pick: int, end: str) -> None:
        held = self.live()[pick % len(self.live())]
        self.world.cancel(held.job.id)
        self.model.cancel(held.job)
        {"finish": self._finish, "release": self._release}[end](held)

    @precondition(lambda self: self.live())
    @rule(worker=workers)
    def crash(self, worker: str) -> None:
        """The worker is killed: it writes nothing, and its leases run out."""
        for held in self.live():
            held.forgotten |= held.worker == worker

    @precondition(lambda self: self.lost())
    @rule(pick=picks)
    def act_on_a_lost_claim(self, pick: int) -> None:
        self._act_late(self.lost()[pick % len(self.lost())].claim)

    @precondition(lambda self: self.live())
    @rule(pick=picks)
    def come_back_too_late(self, pick: int) -> None:
        """The lease is lost, another claims, and then the worker that had stood still goes on."""
        held = self.live()[pick % len(self.live())]
        self._lapse(held)
        self._sweep()
        self._claim("b")
        self._act_late(held.claim)

    def _act_late(self, claim: Claim) -> None:
        late: list[Callable[[], object]] = [
            lambda: self.world.beat(claim, done=TOTAL),
            lambda: self.world.finish(claim, {"mine": True}),
            lambda: self.world.fail(claim, retryable=True),
            lambda: self.world.fail(claim, retryable=False),
            lambda: self.world.release(claim),
            lambda: self.world.lack(claim, claim.artifact_key),
            lambda: self.world.tell(claim, "warmup.step", {"step": 1}),
        ]
        before = self.world.image()
        for act in late:
            with pytest.raises(LeaseLost):
                act()
        assert self.world.image() == before

    # Time

    @precondition(lambda self: self.model.running(lapsed=False))
    @rule(pick=picks, times=st.integers(1, 3))
    def leases_run_out(self, pick: int, times: int) -> None:
        for _ in range(min(times, len(self.model.running(lapsed=False)))):
            running = self.model.running(lapsed=False)
            _, unit = running[pick % len(running)]
            self._lapse(next(held for held in self.claims if held.unit is unit and held.is_live))

    def _lapse(self, held: Held) -> None:
        held.unit.lapsed = True
        self.world.lose_lease(held.claim)

    @precondition(lambda self: any(unit.waits for _, unit in self.model.units()))
    @rule(pick=picks)
    def delay_ends(self, pick: int) -> None:
        waiting = [(job, unit) for job, unit in self.model.units() if unit.waits]
        _, unit = waiting[pick % len(waiting)]
        unit.waits = False
        self.world.end_delay(next(h.claim.unit_id for h in self.claims if h.unit is unit))

    @precondition(lambda self: self.model.turns)
    @rule()
    def turns_end(self) -> None:
        self.model.end_turns()
        self.world.end_turns()

    @precondition(lambda self: any(job.status is JobStatus.CANCELLING for job in self.model.jobs))
    @rule(pick=picks)
    def cancel_grows_old(self, pick: int) -> None:
        cancelling = [job for job in self.model.jobs if job.status is JobStatus.CANCELLING]
        job = cancelling[pick % len(cancelling)]
        job.overdue = True
        self.world.age_cancel(job.id)

    # Dispatchers

    def _sweep(self, *, but: Sequence[Unit] = (), held: Sequence[Job] = ()) -> None:
        with self.world.sessions.begin() as session:
            swept = self.world.sweep(session, AT_ONCE)
        assert swept == (self.model.expire_leases(AT_ONCE, but, held), self.model.expire_cancels(held))

    @rule()
    def sweep(self) -> None:
        self._sweep()

    @rule(first_dies=st.booleans())
    def two_sweeps_at_once(self, first_dies: bool) -> None:
        """The second skips what the first is at; where the first dies before its commit, all waits for the next."""
        with self.world.sessions() as first:
            swept = self.world.sweep(first, AT_ONCE)
            with self.world.sessions.begin() as second:
                assert self.world.sweep(second, AT_ONCE) == (0, 0)
            if first_dies:
                first.rollback()
                return
            first.commit()
        assert swept == (self.model.expire_leases(AT_ONCE), self.model.expire_cancels())

    @precondition(lambda self: self.live())
    @rule(pick=picks)
    def sweep_beside_a_worker_that_stands_still(self, pick: int) -> None:
        """It holds its job's row in the midst of a write, and dies there."""
        held = self.live()[pick % len(self.live())]
        self._lapse(held)
        with self.world.sessions() as stalled:
            job = ledger.lock_claim(stalled, held.claim)
            ledger.finish_unit(stalled, job, held.claim, {})
            stalled.flush()
            self._sweep(held=[held.job])
            stalled.rollback()

    @precondition(lambda self: self.live())
    @rule(pick=picks)
    def sweep_during_a_beat(self, pick: int) -> None:
        """A beat holds its unit's row alone. The sweep leaves that unit, unless the job ends: then it waits for the beat."""
        held = self.live()[pick % len(self.live())]
        siblings = [unit for unit in held.job.running if unit is not held.unit and unit.lapsed]
        if held.job.overdue or any(unit.failures + 1 >= AT_ONCE.max_attempts for unit in siblings):
            return
        self._lapse(held)
        with self.world.sessions.begin() as beating:
            ledger.beat(beating, held.claim, lease_seconds=60, done=TOTAL)
            self._sweep(but=[held.unit])
        self.model.beat(held.unit, TOTAL)

    @precondition(lambda self: self.live())
    @rule(pick=picks, act=st.sampled_from(["beat", "finish", "release"]))
    def sweep_comes_late(self, pick: int, act: str) -> None:
        """The worker writes after the sweep has looked for expired leases and before it has locked the first job."""
        held = self.live()[pick % len(self.live())]
        self._lapse(held)
        real, acted = sweeps.lock_job_if_free, []

        def lock(*arguments: Any) -> Any:
            if not acted:
                acted.append(act)
                if act == "beat":
                    self.world.beat(held.claim, TOTAL // 2)
                    self.model.beat(held.unit, TOTAL // 2)
                else:
                    {"finish": self._finish, "release": self._release}[act](held)
            return real(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweeps, "lock_job_if_free", lock)
            self._sweep()

    # What must hold after every step

    @invariant()
    def ledger_is_as_the_model(self) -> None:
        with self.world.engine.connect() as connection:
            jobs = {row.id: row for row in connection.execute(_JOBS)}
            rows = list(connection.execute(_UNITS))
            events = list(connection.execute(_EVENTS))
        assert len(jobs) == len(self.model.jobs)
        for job in self.model.jobs:
            units = {(row.stage, row.shard): row for row in rows if row.job_id == job.id}
            self._check_job(job, jobs[job.id], list(units.values()))
            assert len(units) == len(job.units)
            for expected in job.units:
                self._check_unit(expected, units[expected.stage, expected.shard])
            check_events(job, units, [(e.type, e.data) for e in events if e.job_id == job.id])
        running = [row.artifact_key for row in rows if row.state == UnitState.RUNNING]
        assert len(running) == len(set(running)), "two units make one artifact at once"

    def _check_job(self, job: Job, row: Any, units: list[Any]) -> None:
        assert row.status == job.status
        over = job.status in TERMINAL
        assert (row.finished_at is not None) is over
        assert (row.deleted_at is not None) is job.deleted
        assert row.deleted_at is None or row.deleted_at >= row.finished_at
        if over:
            assert self.ended.setdefault(job.id, row[:4]) == row[:4], "an end was changed"
            assert not {"pending", "running"} & {unit.state for unit in units}
        if job.status in OPEN:
            assert any(unit.state != UnitState.SUCCEEDED for unit in units), "all is done, yet the job has not ended"
        if job.culprit is not None:
            error = {name: row.error[name] for name in ("code", "stage", "shard", "attempts")}
            history = [(each["attempt"], each["code"]) for each in row.error["history"]]
            last = job.culprit
            expected = {"code": last.reasons[-1][1], "stage": last.stage, "shard": last.shard, "attempts": last.attempt}
            assert (error, history) == (expected, last.reasons)
            assert all(each["detail"] for each in row.error["history"])

    def _check_unit(self, unit: Unit, row: Any) -> None:
        assert (row.state, row.attempt, row.failures) == (unit.state, unit.attempt, unit.failures)
        assert (row.lease_expires_at is not None) is (unit.state is UnitState.RUNNING)
        assert (row.finished_at is None) is (unit.state in (UnitState.PENDING, UnitState.RUNNING))
        assert bool(row.waits) is unit.waits
        assert row.progress_done == unit.done
        assert row.progress_done >= self.progress[row.id, row.attempt], "the progress went back"
        self.progress[row.id, row.attempt] = row.progress_done


_JOBS = text("SELECT id, status::text AS status, error, finished_at, deleted_at FROM selection_jobs")
_UNITS = text("""
    SELECT id, job_id, stage::text AS stage, shard, artifact_key, state::text AS state, attempt, failures, progress_done,
        lease_expires_at, finished_at, not_before > clock_timestamp() AS waits
    FROM job_units
""")
_EVENTS = text("SELECT job_id, type, data FROM job_events ORDER BY id")


@pytest.fixture(scope="module")
def world(postgres_url: str) -> Iterator[LedgerWorld]:
    """In it a lock is waited for a moment only: a wrong order of locks is an error here and no test that hangs."""
    with ledger_world(postgres_url, lock_timeout="500ms") as world:
        yield world


def test_the_ledger_does_as_its_model_in_every_history(world: LedgerWorld) -> None:
    owners = sorted([world.owner, *(new_owner(world.sessions) for _ in range(2))], key=lambda owner: owner["tenant_id"])
    run_state_machine_as_test(
        lambda: LedgerMachine(world, owners),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
