"""Jobs that are cancelled or whose workers are told to end, killed in a warm-up, or many: what is computed is the same. Kills at
every other point are in tests/chaos."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import select
from support.processes import Process, is_running
from support.servers import Servers
from support.tiny import pool_rows, target_rows
from support.waiting import until
from support.worker_jobs import SMALL, Datasets, SharedWorker, computing_world, forget, post, same_selection
from support.world import Json, World

from service import ledger
from service.ledger import Retries
from service.ledger.tables import SelectionJob
from service.plan.parameters import Parameters
from service.plan.stages import JobInputs
from service.settings import WorkerSettings
from worker.process.main import Compute
from worker.units import Work

# Of the jobs that are interrupted, in the one stage that is waited for.
QUICK: Json = {"embedding": {"kind": "hidden", "blocks": 2}, "refine": 0, "validate": False}
LONG = {"samples": SMALL, "epochs": 20, "batch_size": 2, "learning_rate": 1e-4}
# A few samples a batch, and a dear embedding: a stage lasts long enough to be met in its midst.
SLOW = {"WINNOW_WORKER__TOKEN_BUDGET": "64"}
LASTING: Json = {**QUICK, "embedding": {"kind": "jvp", "blocks": 2}}


class TestInterruptions:
    """Each with a seed of its own, so that nothing of another job is reused, and small batches, so that it lasts."""

    @pytest.mark.slow
    def test_a_cancelled_job_stops_and_its_worker_does_the_next(
        self, world: World, worker: Process, datasets: Datasets
    ) -> None:
        large = world.upload(pool_rows(4_000))
        job_id = post(world, large, datasets.target, seed=1, **QUICK)
        world.computing(job_id)
        child = worker.compute_process()
        assert world.cancel(job_id)["status"] in ("cancelling", "cancelled")
        assert world.ended(job_id)["status"] == "cancelled"
        world.succeeded(post(world, world.upload(pool_rows(30)), datasets.target, budget=3, seed=1, **QUICK))
        assert worker.compute_process() == child  # it stopped at its next batch, and is kept

    def test_a_warm_up_is_cancelled_between_its_steps(self, world: World, worker: Process, datasets: Datasets) -> None:
        job_id = post(world, datasets.small, datasets.target, landmarks={"count": 20}, warmup=LONG, **QUICK)
        until("a step", lambda: world.events(job_id, "warmup.step"))
        child = worker.compute_process()
        world.cancel(job_id)
        assert world.ended(job_id)["status"] == "cancelled"
        assert world.events(job_id, "warmup.step")[-1]["step"] < world.events(job_id, "warmup.step")[0]["steps"]
        world.succeeded(
            post(world, datasets.small, datasets.target, landmarks={"count": 20}, budget=3, seed=8, **QUICK)
        )
        assert worker.compute_process() == child

    @pytest.mark.slow
    def test_a_worker_killed_in_a_warm_up_costs_the_unit_and_changes_nothing(
        self, world: World, shared: SharedWorker, datasets: Datasets, tmp_path: Path
    ) -> None:
        shared.stop()
        with world.worker("trainer") as trainer:
            warmup = {**LONG, "epochs": 3}
            job_id = post(
                world, datasets.small, datasets.target, landmarks={"count": 20}, warmup=warmup, seed=9, **QUICK
            )
            until("a step", lambda: world.events(job_id, "warmup.step"))
            trainer.kill()
        with world.worker("successor"):
            world.succeeded(job_id)
        failures = world.events(job_id, "unit.attempt_failed")
        assert [(f["stage"], f["error"]["code"]) for f in failures] == [("warmup", "lease_expired")]
        same_selection(world, job_id, tmp_path)

    @pytest.mark.slow
    def test_one_two_and_five_workers_select_the_same(
        self, world: World, shared: SharedWorker, datasets: Datasets
    ) -> None:
        """Between the runs all that was computed is deleted.

        Slow: ten processes start for it that each import torch. That a worker finds what this process finds is also in
        test_worker.py, and that two find the same, in tests/chaos.
        """
        shared.stop()
        pool = world.upload(pool_rows(700))
        found = []
        with ExitStack() as running:
            for started in (range(1), range(1, 2), range(2, 5)):
                for number in started:
                    running.enter_context(world.worker(f"of-five-{number}", WINNOW_WORKER__TOKEN_BUDGET="256"))
                embedding = {"kind": "hidden", "blocks": 2}
                job = world.succeeded(
                    post(world, pool, datasets.target, seed=10, landmarks={"count": 100}, embedding=embedding)
                )
                provenance = world.get(f"{job['id']}/provenance")
                assert not any(unit["reused"] for unit in provenance["record"]["units"])
                workers = {unit["worker"] for unit in provenance["record"]["units"]}
                found.append((provenance["weights_root"], world.selected(job["id"]), len(workers)))
                forget(world, job["id"])
        assert found[0][:2] == found[1][:2] == found[2][:2]
        assert found[2][2] > 1

    @pytest.mark.slow
    def test_a_worker_that_is_to_end_gives_its_unit_back(
        self, world: World, shared: SharedWorker, datasets: Datasets, tmp_path: Path
    ) -> None:
        shared.stop()
        with world.worker("ending", **SLOW) as ending:
            job_id = post(world, world.upload(pool_rows(500)), datasets.target, seed=4, **LASTING)
            world.computing(job_id)
            child = ending.compute_process()
            assert child is not None
            started = time.monotonic()
            assert ending.stop() == 0
            assert time.monotonic() - started < 20
        assert not is_running(child)
        assert [event["stage"] for event in world.events(job_id, "unit.released")] == ["embed"]
        with world.worker("next"):
            world.succeeded(job_id)
        same_selection(world, job_id, tmp_path)
        assert world.events(job_id, "unit.attempt_failed") == []


class TestHalving:
    """What the child is told after a failure; no worker runs in this world."""

    @pytest.fixture
    def still(self, servers: Servers, tmp_path: Path, tiny_llama: Path) -> Iterator[World]:
        with computing_world(servers, tmp_path, tiny_llama) as made:
            yield made

    @pytest.mark.parametrize(
        ("code", "halvings"), [("compute_died", [0, 0, 1]), ("out_of_memory", [0, 1, 2]), ("internal_error", [0, 0, 0])]
    )
    def test_batches_are_halved_where_memory_ran_out(self, still: World, code: str, halvings: list[int]) -> None:
        post(still, still.upload(pool_rows(50)), still.upload(target_rows(2, "polite_email")))
        told = []
        for _ in range(3):
            with still.sessions.begin() as session:
                work = Work.claimed(session, "test", still.settings.ledger)
                assert work is not None
            with still.sessions.begin() as session:
                told.append(work.message()["halvings"])
                error, retries = {"code": code, "detail": "x"}, Retries(max_attempts=3, seconds=0)
                ledger.fail_unit(session, work.claim, error, retryable=True, retries=retries)
        assert told == halvings
        with still.sessions() as session:
            assert session.scalars(select(SelectionJob.status)).one() == "failed"

    def test_a_halved_budget_reaches_the_stage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compute = Compute(
            artifacts=str(tmp_path), models=tmp_path, settings=WorkerSettings(device="cpu", token_budget=1024)
        )
        budgets: list[int] = []
        monkeypatch.setattr(
            "worker.stages.embed.run", lambda context, *_, **__: budgets.append(context.token_budget) or {}
        )
        job = JobInputs(model={}, pool="", target="", budget=1, parameters=Parameters().model_dump(mode="json"))
        for halvings in (0, 1, 2, 30):
            unit = {"stage": "embed", "artifact_key": "a", "spec": {}, "job": job.as_dict(), "prepared": {}}
            compute.run({**unit, "halvings": halvings}, lambda _: None, lambda *_: None)
        assert budgets == [1024, 512, 256, 1]
