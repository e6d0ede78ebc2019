"""Workers that lack something: their units go to others, they say so and come back, and a job fails only where none can do it."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from support.processes import Process
from support.servers import Servers, free_port
from support.tiny import pool_rows, save_model, target_rows
from support.waiting import until
from support.worker_jobs import LEDGER, MODEL, PARAMETERS, post
from support.world import Json, World, own_settings

from service.health.checks import System, run_checks
from service.ledger.tables import Worker

SOON = {"WINNOW_WORKER__PROVE_SECONDS": "0.5"}


def environments(folder: Path) -> dict[str, dict[str, str]]:
    """Of workers that each lack one thing."""
    (folder / "no-models").mkdir()
    return {
        "model": {"WINNOW_MODELS__FOLDER": str(folder / "no-models")},
        "store": {"WINNOW_ARTIFACTS__URL": str(folder / "other-store")},
        "device": {"WINNOW_WORKER__DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""},
    }


@pytest.fixture
def world(request: pytest.FixtureRequest, servers: Servers, tmp_path: Path, tiny_llama: Path) -> Iterator[World]:
    """`request.param`: for how long jobs wait that no worker can do."""
    ledger = LEDGER.model_copy(update={"unable_seconds": request.param})
    with own_settings(servers, tmp_path, ledger=ledger) as settings:
        shutil.copytree(tiny_llama, settings.models.folder / MODEL)
        with World.made(settings, runs=True) as made:
            yield made


def lacks(world: World, process: Process) -> list[Json]:
    with world.sessions() as session:
        rows = {row.worker_id.rpartition(":")[2]: row.lacks for row in session.scalars(select(Worker))}
    return rows.get(str(process.pid), [])


def small_job(world: World, method: str = "rds_plus") -> str:
    pool, target = world.upload(pool_rows(40)), world.upload(target_rows(4, "python_function"))
    return world.post(model=MODEL, pool=pool, target=target, budget=5, max_length=128, method=method)


def found(world: World, name: str) -> Any:
    return run_checks(System(world.settings, world.engine), "database", "migrations", name)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("world", [600.0], indirect=True)
def test_a_healthy_worker_does_the_jobs_of_those_that_lack_something_until_they_are_mended(world: World) -> None:
    with ExitStack() as started:
        unfit = {
            name: started.enter_context(world.worker(name, **SOON, **environment))
            for name, environment in environments(world.folder).items()
        }
        for name in ("store", "device"):  # they prove it at their start
            until(f"{name} is missed", lambda name=name: lacks(world, unfit[name]))
        first = small_job(world)
        until("the model is missed", lambda: world.events(first, "unit.released"))
        until("the user is told", lambda: world.events(first, "job.waiting"))
        assert world.get(first)["status"] in ("queued", "running")

        healthy = started.enter_context(world.worker("healthy"))
        jobs = [first, *(small_job(world) for _ in range(3))]
        for job_id in jobs:
            world.succeeded(job_id)
            record = world.get(f"{job_id}/provenance")["record"]
            assert {unit["worker"].rpartition(":")[2] for unit in record["units"]} == {str(healthy.pid)}
            assert world.events(job_id, "unit.attempt_failed") == []
        assert sum(len(world.events(job_id, "unit.released")) for job_id in jobs) == 1, "a unit went to and fro"
        check = found(world, "workers")
        assert check.level == "warning"
        assert all(f":{process.pid} " in check.detail for process in unfit.values())
        assert f":{healthy.pid} " not in check.detail
        assert str(world.folder) not in check.detail

        shutil.copytree(world.settings.models.folder / MODEL, world.folder / "no-models" / MODEL)
        shutil.rmtree(world.folder / "other-store", ignore_errors=True)
        (world.folder / "other-store").symlink_to(world.folder / "store")
        for name in ("model", "store"):
            until(f"{name} is back", lambda name=name: not lacks(world, unfit[name]))
        healthy.stop()
        unfit["model"].stop()
        job = small_job(world, "random")
        world.succeeded(job)
        units = world.get(f"{job}/provenance")["record"]["units"]
        assert {unit["worker"].rpartition(":")[2] for unit in units} == {str(unfit["store"].pid)}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1.0], indirect=True)
@pytest.mark.parametrize("what", ["model", "store", "device"])
def test_a_job_that_no_live_worker_can_do_fails_with_the_reason_and_without_paths(world: World, what: str) -> None:
    port = free_port()
    environment = {**environments(world.folder)[what], "WINNOW_WORKER__METRICS_PORT": str(port)}
    waiting = small_job(world)
    with world.worker(what, **SOON, **environment) as worker:
        job = world.ended(waiting)
        assert job["status"] == "failed"
        assert (job["error"]["code"], job["error"]["stage"]) == ("no_able_worker", "prepare")
        assert [entry["code"] for entry in job["error"]["history"]] == ["no_able_worker"]
        reason = lacks(world, worker)[0]["problem"]
        assert reason in job["error"]["detail"]
        events = world.client.get(f"/v1/selection-jobs/{waiting}/events", params={"limit": 1000}).text
        assert str(world.folder) not in events + str(job)
        assert found(world, "workers").level == ("warning" if what == "model" else "FAIL")
        assert worker.is_alive
        ready = httpx.get(f"http://127.0.0.1:{port}/readyz")
        assert (ready.status_code, ready.text) == ((200, "ok") if what == "model" else (503, reason))
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert ("winnow_worker_fit 1.0" if what == "model" else "winnow_worker_fit 0.0") in metrics
        assert f"winnow_worker_lacks {float(what == 'model')}" in metrics
    log = worker.log.read_text()
    assert reason in log


@pytest.mark.slow
@pytest.mark.parametrize("world", [600.0], indirect=True)
@pytest.mark.parametrize("api_has_weights", [True, False])
def test_a_model_that_changes_during_a_job_stops_it_until_it_is_as_it_was(
    world: World, tmp_path: Path, api_has_weights: bool
) -> None:
    models, kept = world.settings.models.folder, tmp_path / "kept"
    if (
        not api_has_weights
    ):  # then what the model was when the job was posted is not known, but only what it was at its start
        models = Path(shutil.copytree(models, tmp_path / "models-of-the-worker"))
        (world.settings.models.folder / MODEL / "model.safetensors").unlink()
    folder = models / MODEL
    pool, target = world.upload(pool_rows(1_100)), world.upload(target_rows(8, "python_function"))
    with world.worker("only", WINNOW_MODELS__FOLDER=str(models), **SOON) as worker:
        job_id = post(world, pool, target, **PARAMETERS)
        world.computing(job_id)
        assert ("submitted_fingerprint" in world.get(job_id)["model"]) is api_has_weights
        other = save_model(tmp_path / "other", seed=1)
        folder.rename(kept)
        other.rename(folder)
        until("the change is seen", lambda: world.events(job_id, "unit.released"))
        until("the user is told", lambda: world.events(job_id, "job.waiting"))
        world.succeeded(small_job(world, "random"))  # it was posted with the files that are there now
        shutil.rmtree(folder)
        kept.rename(folder)
        world.succeeded(job_id)
        assert world.events(job_id, "unit.attempt_failed") == []
        until("nothing is missed", lambda: not lacks(world, worker))
