"""A service whose jobs real worker processes compute, and the same jobs computed in this process."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.progress import Progress
from safetensors.numpy import load_file

from service.ledger.store_identity import MARKER
from service.ledger.tables import SelectionJob
from service.plan.stages import Stage
from service.settings import LedgerSettings, WorkerSettings
from support.processes import Process
from support.servers import Servers
from support.tiny import pool_rows, target_rows
from support.waiting import until
from support.world import Json, World, own_settings
from worker.local_run import LocalJob
from worker.process.main import Compute
from worker.units import job_inputs

# A lease so short that a killed worker's unit comes back within the test; a busy machine still beats in time.
LEDGER = LedgerSettings(lease_seconds=6, beat_seconds=0.5, sweep_seconds=0.5, retry_seconds=0.5)

MODEL = "tiny-llama"
POOL, LANDMARKS = 1_100, 150  # landmarks from more than one row group of the pool's tokens
SMALL, TARGET, BUDGET = 60, 16, 40
PARAMETERS: Json = {
    "landmarks": {"count": LANDMARKS},
    "gradient": {"projection_dim": 1024},
    "dtype": "float32",
    "max_length": 128,
}


@contextmanager
def computing_world(servers: Servers, folder: Path, model: Path, **more: Any) -> Iterator[World]:
    """With the model registered, and without a worker; `more` is for `make_settings`."""
    with own_settings(servers, folder, **{"ledger": LEDGER, **more}) as settings:
        shutil.copytree(model, settings.models.folder / MODEL)
        with World.made(settings, runs=True) as world:
            until("the store is marked", Path(world.store.root, MARKER).is_file)
            yield world


class Datasets:
    """What the jobs of a world select from and for, each uploaded once."""

    def __init__(self, world: World) -> None:
        self.pool, self.small = (world.upload(pool_rows(count)) for count in (POOL, SMALL))
        self.target = world.upload(target_rows(TARGET, "python_function"))


class SharedWorker:
    """The worker of all tests that leave it alive; the others stop it, and who needs it next starts another."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._worker: Process | None = None

    def running(self) -> Process:
        if self._worker is None:
            self._worker = Process.worker(self._world.settings, self._world.folder / "shared.log")
        return self._worker

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
        self._worker = None


def post(world: World, pool: str, target: str, **changes: Any) -> str:
    return world.post(**{"model": MODEL, "pool": pool, "target": target, "budget": BUDGET, **PARAMETERS, **changes})


def forget(world: World, job_id: str) -> None:
    """Deletes what the job's units have left in the store, so that the same job computes all of it."""
    for unit in world.get(f"{job_id}/provenance")["record"]["units"]:
        for key in (unit["artifact"], f"{unit['artifact']}.json"):
            world.store.delete(key)


def computed_here(world: World, job_id: str, folder: Path) -> dict[str, np.ndarray]:
    """What the same job selects in this process, with a store of its own that holds the datasets only."""
    shutil.copytree(world.folder / "store" / "datasets", folder / "datasets")
    with world.sessions() as session:
        job = job_inputs(session, session.get_one(SelectionJob, job_id))
    settings = WorkerSettings(device="cpu", threads=1)
    compute = Compute(artifacts=str(folder), models=world.settings.models.folder, settings=settings)
    done = LocalJob(compute, job, Progress(disable=True)).run(POOL)
    with compute.store.local(done[Stage.SELECT][0].artifact_key) as path:
        return dict(load_file(path))


def same_selection(world: World, job_id: str, folder: Path) -> None:
    """Workers have found what this process finds."""
    arrays, found = computed_here(world, job_id, folder), world.selected(job_id)
    assert [row["index"] for row in found] == arrays["selected"].tolist()
    assert [row["weight"] for row in found] == pytest.approx(arrays["weight"][arrays["selected"]], abs=1e-4)
