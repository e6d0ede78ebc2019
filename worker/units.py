"""A unit of work: what its compute process needs, and what its end writes: the next units, or the job's results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy.orm import Session

from service import ledger
from service.datasets.tables import Dataset
from service.jobs import planning, repository
from service.ledger import Claim, Lack
from service.ledger.tables import JobUnit, SelectionJob
from service.plan import estimate
from service.plan.artifact_keys import result_key
from service.plan.job_counts import JobCounts
from service.plan.operations import Shape
from service.plan.preparing import is_prepared, is_shard
from service.plan.stages import Done, JobInputs, Stage, UnitSpec
from service.plan.versions import worker_version
from service.plan.waves import is_last, next_units
from service.results import repository as results
from service.settings import LedgerSettings, ModelSettings
from service.storage.artifacts import ArtifactStore
from worker.errors import ComputeDied, OutOfMemory, check_shards
from worker.publish import Publication, differences

_LOOKED_UP = 8  # units of a stage whose artifacts are asked for; in a remote store, each is a request
_COUNTED_BY_THE_PLAN = (Stage.WARMUP, Stage.CURVATURE, Stage.CHOOSE_EMBEDDING, Stage.VALIDATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A claimed unit and all that it takes to do it. `halvings`: how often its batches are halved, since memory ran out."""

    claim: Claim
    job: JobInputs
    prepared: dict[str, Any]
    halvings: int
    trace: str | None

    @classmethod
    def claimed(
        cls, session: Session, worker_id: str, settings: LedgerSettings, without: Sequence[Lack] = ()
    ) -> Self | None:
        """Claims a unit of none that the worker lacks; None where there is none. Commit at once: the claim holds a job's row."""
        claim = ledger.claim_unit(
            session,
            worker_id=worker_id,
            lease_seconds=settings.lease_seconds,
            code=worker_version(),
            turn_seconds=settings.turn_seconds,
            without=without,
        )
        if claim is None:
            return None
        job = session.get_one(SelectionJob, claim.job_id)
        return cls(
            claim=claim,
            job=job_inputs(session, job),
            prepared=prepared_result(session, job.id),
            halvings=_halvings(session.get_one(JobUnit, claim.unit_id)),
            trace=job.trace,
        )

    @property
    def is_last(self) -> bool:
        """Whether the job ends with it."""
        return is_last(self.claim.stage, self.job.parameters)

    def message(self) -> dict[str, Any]:
        """The `run` message to the compute process."""
        return {
            "stage": self.claim.stage,
            "artifact_key": self.claim.artifact_key,
            "spec": self.claim.spec,
            "job": self.job.as_dict(),
            "prepared": self.prepared,
            "halvings": self.halvings,
        }


def _halvings(unit: JobUnit) -> int:
    """A process that was killed may have been killed by anyone: its unit is tried once more as it was, so that a kill changes no
    bit of what is computed, and is taken for out of memory from the second time on."""
    code = "" if unit.error is None else unit.error["code"]
    return {OutOfMemory.code: unit.failures, ComputeDied.code: unit.failures - 1}.get(code, 0)


def job_inputs(session: Session, job: SelectionJob) -> JobInputs:
    return JobInputs(
        model=job.model,
        pool=session.get_one(Dataset, job.pool_id).fingerprint,
        target=session.get_one(Dataset, job.target_id).fingerprint,
        budget=job.budget,
        parameters=job.parameters,
        salt=job.id if job.reproduces else None,  # a reproduction finds nothing of any other job
    )


def prepared_result(session: Session, job_id: str) -> dict[str, Any]:
    """The result of the job's prepare stage, which every later stage needs; before it is there, nothing that any needs."""
    return ledger.last_result(session, job_id, Stage.PREPARE) or {}


def history(session: Session, job_id: str) -> dict[Stage, list[Done]]:
    """The finished units of the job."""
    done: dict[Stage, list[Done]] = {}
    for unit in ledger.unit_results(session, job_id):
        if unit.result is not None:
            finished = Done(artifact_key=unit.artifact_key, spec=unit.spec, result=unit.result)
            done.setdefault(unit.stage, []).append(finished)
    return done


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstWave:
    """What the plan of a prepared job needs of the store and of the model's files."""

    shape: Shape | str
    already: dict[Stage, float]

    @classmethod
    def read(cls, store: ArtifactStore, settings: ModelSettings, job: JobInputs, units: Sequence[UnitSpec]) -> Self:
        already = {}
        for stage in {unit.stage for unit in units}:
            keys = [unit.artifact_key for unit in units if unit.stage == stage]
            looked_up = keys[:: -(-len(keys) // _LOOKED_UP)]
            already[stage] = sum(store.exists(result_key(key)) for key in looked_up) / len(looked_up)
        return cls(shape=planning.shape_of(settings, job.model), already=already)

    def plan(self, session: Session, job: JobInputs, prepared: dict[str, Any]) -> dict[str, Any]:
        """The plan and its cost, now that tokens are counted and the names of the first wave's artifacts are known."""
        counts = JobCounts.of_prepared(prepared, job.budget)
        return estimate.plan(self.shape, job.parameters, counts, planning.measured_rates(session), self.already)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of a unit. Whatever takes the store or a network is read before the transaction that `write` is called in."""

    work: Work
    result: dict[str, Any]
    first_wave: FirstWave | None = None
    publication: Publication | None = None

    @classmethod
    def read(
        cls,
        store: ArtifactStore,
        settings: ModelSettings,
        work: Work,
        result: dict[str, Any],
        done: dict[Stage, list[Done]],
    ) -> Self:
        """`done`: the units that the job has finished before; of interest to the last one only."""
        finished = Done(artifact_key=work.claim.artifact_key, spec=work.claim.spec, result=result)
        done = {**done, work.claim.stage: [*done.get(work.claim.stage, ()), finished]}
        first_wave = publication = None
        if work.claim.stage == Stage.PREPARE and is_prepared(result):
            first_wave = FirstWave.read(store, settings, work.job, next_units(work.job, done))
        elif work.is_last:
            publication = Publication.read(store, work.job, done, planning.shape_of(settings, work.job.model))
        return cls(work=work, result=result, first_wave=first_wave, publication=publication)

    def write(self, session: Session) -> None:
        """Ends the unit; after the last of a wave starts the next, after the last of all publishes the results and ends the job.

        Raises:
            LeaseLost: the unit is no longer this worker's.
            ModelError: the job reproduces another one, of whose model the files are others now.
            TooManyUnusable: it has more rows that take no part than it allows, and this was not known before.
        """
        job = ledger.lock_claim(session, self.work.claim)
        is_last_of_wave = ledger.finish_unit(session, job, self.work.claim, self._with_operations(session))
        if is_shard(self.work.claim.spec) and self.result["unusable"]["count"]:
            found = (unit for unit in ledger.unit_results(session, job.id, Stage.PREPARE) if is_shard(unit.spec))
            check_shards(job.parameters, ((unit.spec["dataset"], unit.result) for unit in found if unit.result))
        if not is_last_of_wave:
            return
        if self.publication is not None:
            self.publication.write(session, job)
            ledger.succeed_job(session, job)
            return
        if self.first_wave is not None:
            if job.reproduces is not None:
                record = results.provenance(session, job.reproduces).record
                ledger.add_event(session, job.id, "job.reproduction", differences=differences(record, self.result))
            unusable = self.result.get("unusable", {})  # of the version before: not counted
            if any(found["count"] for found in unusable.values()):
                ledger.add_event(session, job.id, "job.unusable", **unusable)
            planned = self.first_wave.plan(session, self.work.job, self.result)
            ledger.add_plan(session, job, planned)
        units = next_units(self.work.job, history(session, job.id))
        ledger.start_stages(session, job, units, code=worker_version())

    def _with_operations(self, session: Session) -> dict[str, Any]:
        """The result with the stage's planned operations where it is one unit that did not count its own, for the rates."""
        claim = self.work.claim
        if "operations" in self.result or claim.stage not in _COUNTED_BY_THE_PLAN:
            return self.result
        planned = repository.last_event(session, claim.job_id, "job.planned")
        stages = {entry["stage"]: entry["operations"] for entry in planned["stages"]} if planned else {}
        return {**self.result, "operations": stages.get(claim.stage)}
