"""What the tests of the ledger stand on: databases of their own, and jobs made without the API."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

import service.tables  # noqa: F401  # every table must be known before one is mapped to its foreign keys
from service import ledger, tasks
from service.auth.tables import ApiKey, Tenant
from service.datasets.tables import Dataset
from service.db.engine import Sessions, make_engine, make_sessions
from service.ids import new_id
from service.ledger import Claim, Retries
from service.ledger.rows import create_units
from service.ledger.tables import JobEvent, JobUnit, SelectionJob
from service.plan.stages import Stage, UnitSpec
from service.settings import DatabaseSettings
from support.servers import new_database
from support.waiting import at_once

__all__ = [
    "AT_ONCE",
    "CANCEL_SECONDS",
    "LEASE",
    "LedgerWorld",
    "at_once",
    "create_job",
    "ledger_world",
    "new_database",
    "new_owner",
    "new_task",
    "unit",
    "wait_until",
]

LEASE = 60.0
CANCEL_SECONDS = 3600.0
TURN_SECONDS = 3600.0
AT_ONCE = Retries(max_attempts=3, seconds=0)


def unit(stage: Stage, shard: int = 0, *, key: str | None = None, total: int = 100) -> UnitSpec:
    return UnitSpec(
        stage=stage, shard=shard, artifact_key=key or new_id("artifact"), spec={"shard": shard}, total=total
    )


def create_job(session: Session, job: SelectionJob, first: Sequence[UnitSpec]) -> None:
    """Adds the job, its first units and its first event to the session's transaction."""
    session.add(job)
    session.flush()
    ledger.add_event(session, job.id, "job.queued")
    create_units(session, job.id, first, None)


@dataclass(frozen=True)
class LedgerWorld:
    """A database whose ledger is empty, and the steps of workers on it, each in a transaction of its own."""

    url: str
    engine: Engine
    sessions: Sessions
    owner: dict[str, str]

    def empty(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(text("DELETE FROM selection_jobs"))
            connection.execute(text("DELETE FROM workers"))
            connection.execute(text("DELETE FROM tasks"))
            connection.execute(text("UPDATE tenants SET last_scheduled_at = NULL"))

    def job(self, *units: UnitSpec, owner: dict[str, str] | None = None) -> str:
        """A queued job with the units, or with one unit of `prepare`; of the world's tenant, or of another one's `owner`."""
        job_id = new_id("job")
        with self.sessions.begin() as session:
            job = SelectionJob(
                id=job_id,
                status="queued",
                model={"kind": "registered", "name": "none"},
                budget=1,
                parameters={},
                request={},
                job_metadata={},
                **(owner or self.owner),
            )
            create_job(session, job, units or [unit(Stage.PREPARE)])
        return job_id

    def try_claim(self, worker_id: str = "w", lease_seconds: float = LEASE) -> Claim | None:
        with self.sessions.begin() as session:
            return ledger.claim_unit(
                session, worker_id=worker_id, lease_seconds=lease_seconds, turn_seconds=TURN_SECONDS
            )

    def claim(self, worker_id: str = "w", lease_seconds: float = LEASE) -> Claim:
        claim = self.try_claim(worker_id, lease_seconds)
        assert claim is not None, "there is no unit to claim"
        return claim

    def beat(self, claim: Claim, done: int = 0, lease_seconds: float = LEASE) -> ledger.Beat:
        with self.sessions.begin() as session:
            return ledger.beat(session, claim, lease_seconds=lease_seconds, done=done)

    def tell(self, claim: Claim, kind: str, data: dict[str, Any]) -> None:
        with self.sessions.begin() as session:
            ledger.record_event(session, claim, kind, data)

    def finish(self, claim: Claim, result: dict[str, Any] | None = None, then: Sequence[UnitSpec] = ()) -> bool:
        """As the supervisor does: the last unit of a wave starts those of the next; a finished `validate` ends the job."""
        with self.sessions.begin() as session:
            job = ledger.lock_claim(session, claim)
            complete = ledger.finish_unit(session, job, claim, result or {})
            if complete and claim.stage is Stage.VALIDATE:
                ledger.succeed_job(session, job)
            elif complete and then:
                ledger.start_stages(session, job, then)
        return complete

    def start(self, job_id: str, *units: UnitSpec) -> None:
        with self.sessions.begin() as session:
            ledger.start_stages(session, session.get_one(SelectionJob, job_id), units)

    def fail(self, claim: Claim, *, retryable: bool, code: str = "broken", retries: Retries = AT_ONCE) -> bool:
        with self.sessions.begin() as session:
            error = {"code": code, "detail": f"It is {code}."}
            return ledger.fail_unit(session, claim, error, retryable=retryable, retries=retries)

    def lack(self, claim: Claim, key: str, retries: Retries = AT_ONCE) -> None:
        """The claim's unit finds the artifact damaged."""
        with self.sessions.begin() as session:
            error = {"code": "artifact_damaged", "detail": "It is damaged.", "artifact": key}
            ledger.remake_artifact(session, claim, error, retries=retries)

    def release(self, claim: Claim) -> None:
        with self.sessions.begin() as session:
            ledger.release_unit(session, claim, reason="the worker shuts down")

    def cancel(self, job_id: str) -> None:
        with self.sessions.begin() as session:
            ledger.request_cancel(session, session.get_one(SelectionJob, job_id))

    def expire(self, retries: Retries = AT_ONCE) -> int:
        with self.sessions.begin() as session:
            return ledger.expire_leases(session, retries=retries)

    def expire_cancels(self, after_seconds: float = CANCEL_SECONDS) -> int:
        with self.sessions.begin() as session:
            return ledger.expire_cancels(session, after_seconds=after_seconds)

    def sweep(self, session: Session, retries: Retries = AT_ONCE) -> tuple[int, int]:
        """What a pass of the dispatcher does, in the caller's transaction: the leases and the cancels that it ended."""
        return ledger.expire_leases(session, retries=retries), ledger.expire_cancels(
            session, after_seconds=CANCEL_SECONDS
        )

    def delete(self, job_id: str) -> None:
        with self.sessions.begin() as session:
            ledger.delete_job(session, session.get_one(SelectionJob, job_id))

    def claimable_count(self) -> int:
        with self.sessions() as session:
            return ledger.claimable_count(session)

    def lose_lease(self, claim: Claim) -> None:
        """As time does."""
        self._age("job_units", "lease_expires_at", id=claim.unit_id)

    def end_delay(self, unit_id: int) -> None:
        """As time does."""
        self._age("job_units", "not_before", id=unit_id)

    def age_cancel(self, job_id: str) -> None:
        """As time does: it was asked for long ago."""
        self._age("selection_jobs", "cancel_requested_at", id=job_id)

    def end_turns(self) -> None:
        """As time does."""
        past = timedelta(seconds=2 * TURN_SECONDS)
        with self.engine.begin() as connection:
            connection.execute(text("DELETE FROM workers"))
            connection.execute(text("UPDATE tenants SET last_scheduled_at = last_scheduled_at - :past"), {"past": past})

    def _age(self, table: str, column: str, **row: Any) -> None:
        past = timedelta(seconds=2 * CANCEL_SECONDS)
        with self.engine.begin() as connection:
            connection.execute(
                text(f"UPDATE {table} SET {column} = now() - :past WHERE id = :id"), {"past": past, **row}
            )

    def status(self, job_id: str) -> str:
        return self.row(job_id).status.value

    def row(self, job_id: str) -> SelectionJob:
        with self.sessions() as session:
            return session.get_one(SelectionJob, job_id)

    def units(self, job_id: str) -> list[JobUnit]:
        with self.sessions() as session:
            return ledger.unit_results(session, job_id)

    def unit(self, claim: Claim) -> JobUnit:
        with self.sessions() as session:
            return session.get_one(JobUnit, claim.unit_id)

    def states(self, job_id: str) -> list[str]:
        return [unit.state.value for unit in self.units(job_id)]

    def events(self, job_id: str) -> list[tuple[str, dict[str, Any]]]:
        with self.sessions() as session:
            found = session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.id))
            return [(event.type, event.data) for event in found]

    def event_types(self, job_id: str) -> list[str]:
        return [kind for kind, _ in self.events(job_id)]

    def image(self) -> list[Any]:
        """Everything the ledger holds, to tell that nothing was written."""
        tables = ("selection_jobs", "job_units", "job_events")
        with self.engine.connect() as connection:
            return [connection.execute(text(f"SELECT t::text FROM {t} t ORDER BY id")).all() for t in tables]


def new_owner(sessions: Sessions) -> dict[str, str]:
    """A tenant with a key and a dataset, as a job's columns name them."""
    tenant_id, key_id, dataset_id = new_id("tnt"), new_id("key"), new_id("ds")
    content = {"fingerprint": "0" * 64, "row_count": 9, "byte_count": 9, "sources": {}}
    with sessions.begin() as session:
        session.add(Tenant(id=tenant_id, name=tenant_id))
        session.flush()
        session.add(ApiKey(id=key_id, tenant_id=tenant_id, name="key", prefix=key_id, digest=bytes(32)))
        session.add(Dataset(id=dataset_id, tenant_id=tenant_id, name="pool", **content))
    return {"tenant_id": tenant_id, "key_id": key_id, "pool_id": dataset_id, "target_id": dataset_id}


def new_task(world: LedgerWorld, owner: dict[str, str] | None = None, **more: Any) -> str:
    """The id of a task of the world's tenant, or of another one's `owner`."""
    whose = owner or world.owner
    given = {"kind": "import_dataset", "subject": new_id("ds"), "input": {}, **more}
    with world.sessions.begin() as session:
        return tasks.create(session, tenant_id=whose["tenant_id"], key_id=whose["key_id"], **given).id


@contextmanager
def ledger_world(postgres_url: str, *, lock_timeout: str = "0") -> Iterator[LedgerWorld]:
    """With a `lock_timeout` a lock that is waited for so long is an error, and no test that hangs."""
    with new_database(postgres_url) as url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {connection.info.dbname} SET lock_timeout = '{lock_timeout}'")
        engine = make_engine(DatabaseSettings(url=url, pool_size=10))
        sessions = make_sessions(engine)
        try:
            yield LedgerWorld(url, engine, sessions, new_owner(sessions))
        finally:
            engine.dispose()


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> float:
    """Seconds until the condition held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - started


# What a worker may do with its claim, late or in time.
LATE: dict[str, Callable[[LedgerWorld, Claim], object]] = {
    "beat": lambda world, claim: world.beat(claim, done=99),
    "finish": lambda world, claim: world.finish(claim, {"mine": True}),
    "fail": lambda world, claim: world.fail(claim, retryable=True),
    "fail for good": lambda world, claim: world.fail(claim, retryable=False),
    "release": lambda world, claim: world.release(claim),
}
ENDINGS: dict[str, Callable[[LedgerWorld, Claim], object]] = {
    "release": lambda world, claim: world.release(claim),
    "finish": lambda world, claim: world.finish(claim),
    "fail": lambda world, claim: world.fail(claim, retryable=False),
    "fail retryably": lambda world, claim: world.fail(claim, retryable=True),
    "expire": lambda world, claim: (world.lose_lease(claim), world.expire()),
}
