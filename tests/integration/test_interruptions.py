"""Jobs that are cancelled or whose workers are told to end, killed in a warm-up, or many: what is computed is the same. Kills at
every other point are in tests/chaos."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import select
from tiny import pool_rows, target_rows
from worker_world import (
    MODEL,
    POOL,
    SMALL,
    TARGET,
    Json,
    Shared,
    Worker,
    World,
    is_running,
    post,
    reference,
    same_selection,
    until,
)

from service.jobs import ledger
from service.jobs.ledger import Claim, Retries
from service.jobs.parameters import Parameters
from service.jobs.tables import SelectionJob
from service.settings import WorkerSettings
from worker.compute import Compute
from worker.stages.plan import JobInputs
from worker.units import unit_message

# Of the jobs that are interrupted, in the one stage that is waited for.
QUICK: Json = {"embedding": {"kind": "hidden", "blocks": 2}, "refine": 0, "validate": False}
LONG = {"samples": SMALL, "epochs": 20, "batch_size": 2, "learning_rate": 1e-4}
# A few samples a batch, and a dear embedding: a stage lasts long enough to be met in its midst.
SLOW = {"token_budget": "64"}
LASTING: Json = {**QUICK, "embedding": {"kind": "jvp", "blocks": 2}}


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, postgres_url: str, broker_url: str, tiny_llama: Path
) -> Iterator[World]:
    with World.made(tmp_path_factory.mktemp("world"), postgres_url, broker_url, number=5) as made:
        shutil.copytree(tiny_llama, made.folder / "models" / MODEL)
        yield made


@pytest.fixture(scope="module")
def pool(world: World) -> str:
    return world.upload(pool_rows(POOL))


@pytest.fixture(scope="module")
def small(world: World) -> str:
    return world.upload(pool_rows(SMALL))


@pytest.fixture(scope="module")
def target(world: World) -> str:
    return world.upload(target_rows(TARGET, "python_function"))


@pytest.fixture(scope="module")
def shared(world: World) -> Iterator[Shared]:
    started = Shared(world)
    yield started
    started.stop()


@pytest.fixture
def worker(shared: Shared) -> Worker:
    return shared.running()


class TestInterruptions:
    """Each with a seed of its own, so that nothing of another job is reused, and small batches, so that it lasts."""

    def test_a_cancelled_job_stops_and_its_worker_does_the_next(
        self, world: World, worker: Worker, target: str
    ) -> None:
        large = world.upload(pool_rows(8_000))
        job_id = post(world, large, target, seed=1, **QUICK)
        world.computing(job_id)
        child = worker.child()
        answer = world.client.post(f"/v1/selection-jobs/{job_id}/cancel").json()
        assert answer["status"] in ("cancelling", "cancelled")
        assert world.ended(job_id)["status"] == "cancelled"
        world.succeeded(post(world, world.upload(pool_rows(30)), target, budget=3, seed=1, **QUICK))
        assert worker.child() == child  # it stopped at its next batch, and is kept

    def test_a_warm_up_is_cancelled_between_its_steps(
        self, world: World, worker: Worker, small: str, target: str
    ) -> None:
        job_id = post(world, small, target, landmarks={"count": 20}, warmup=LONG, **QUICK)
        until("a step", lambda: world.events(job_id, "warmup.step"))
        child = worker.child()
        world.client.post(f"/v1/selection-jobs/{job_id}/cancel")
        assert world.ended(job_id)["status"] == "cancelled"
        assert world.events(job_id, "warmup.step")[-1]["step"] < world.events(job_id, "warmup.step")[0]["steps"]
        world.succeeded(post(world, small, target, landmarks={"count": 20}, budget=3, seed=8, **QUICK))
        assert worker.child() == child

    def test_a_worker_killed_in_a_warm_up_costs_the_unit_and_changes_nothing(
        self, world: World, shared: Shared, small: str, target: str, tmp_path: Path
    ) -> None:
        shared.stop()
        with world.worker("trainer") as trainer:
            job_id = post(world, small, target, landmarks={"count": 20}, warmup={**LONG, "epochs": 6}, seed=9, **QUICK)
            until("a step", lambda: world.events(job_id, "warmup.step"))
            trainer.kill()
        with world.worker("successor"):
            world.succeeded(job_id)
        failures = world.events(job_id, "unit.attempt_failed")
        assert [(f["stage"], f["error"]["code"]) for f in failures] == [("warmup", "lease_expired")]
        same_selection(world, job_id, reference(world, job_id, tmp_path))

    def test_one_two_and_five_workers_select_the_same(self, world: World, shared: Shared, target: str) -> None:
        """METHOD 9, point 7. Between the runs all that was computed is deleted."""
        shared.stop()
        pool = world.upload(pool_rows(700))
        found = []
        with ExitStack() as running:
            for more in (1, 1, 3):
                for _ in range(more):
                    running.enter_context(
                        world.worker(f"of-five-{len(found)}-{time.monotonic_ns()}", token_budget="256")
                    )
                job = world.succeeded(
                    post(
                        world,
                        pool,
                        target,
                        seed=10,
                        landmarks={"count": 100},
                        embedding={"kind": "hidden", "blocks": 2},
                    )
                )
                provenance = world.get(f"{job['id']}/provenance")
                assert not any(unit["reused"] for unit in provenance["record"]["units"])
                workers = {unit["worker"] for unit in provenance["record"]["units"]}
                found.append((provenance["weights_root"], world.selected(job["id"]), len(workers)))
                world.forget(job["id"])
        assert found[0][:2] == found[1][:2] == found[2][:2]
        assert found[2][2] > 1

    def test_a_worker_that_is_to_end_gives_its_unit_back(
        self, world: World, shared: Shared, pool: str, target: str, tmp_path: Path
    ) -> None:
        shared.stop()
        with world.worker("ending", **SLOW) as ending:
            job_id = post(world, pool, target, seed=4, **LASTING)
            world.computing(job_id)
            child = ending.child()
            assert child is not None
            started = time.monotonic()
            assert ending.terminate() == 0
            assert time.monotonic() - started < 20
        assert not is_running(child)
        assert [e["data"]["stage"] for e in world.events(job_id) if e["type"] == "unit.released"] == ["embed"]
        with world.worker("next"):
            world.succeeded(job_id)
        same_selection(world, job_id, reference(world, job_id, tmp_path))
        assert not [e for e in world.events(job_id) if e["type"] == "unit.attempt_failed"]


class TestHalving:
    """What the child is told after a failure; no worker runs in this world."""

    @pytest.fixture
    def still(
        self, tmp_path: Path, postgres_url: str, broker_url: str, tiny_llama: Path, request: pytest.FixtureRequest
    ) -> Iterator[World]:
        number = 2 + ["compute_died", "out_of_memory", "internal_error"].index(request.node.callspec.params["code"])
        with World.made(tmp_path, postgres_url, broker_url, number=number) as made:
            shutil.copytree(tiny_llama, made.folder / "models" / MODEL)
            yield made

    @pytest.mark.parametrize(
        ("code", "halvings"), [("compute_died", [0, 0, 1]), ("out_of_memory", [0, 1, 2]), ("internal_error", [0, 0, 0])]
    )
    def test_batches_are_halved_where_memory_ran_out(self, still: World, code: str, halvings: list[int]) -> None:
        post(still, still.upload(pool_rows(50)), still.upload(target_rows(2, "polite_email")))
        told = []
        for _ in range(3):
            with still.sessions.begin() as session:
                claim = ledger.claim_unit(session, worker_id="test", lease_seconds=60)
                assert isinstance(claim, Claim)
            with still.sessions.begin() as session:
                told.append(unit_message(session, claim)["halvings"])
                error = {"code": code, "detail": "x"}
                ledger.fail_unit(session, claim, error, retryable=True, retries=Retries(max_attempts=3, seconds=0))
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
