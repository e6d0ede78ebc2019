"""A database, a queue and a store of its own, the API over them, and real Celery workers that a test starts and kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
import psutil
import psycopg
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from rich.progress import Progress
from safetensors.numpy import load_file
from sqlalchemy.engine import make_url

from service.app import create_app
from service.artifacts import ArtifactStore
from service.database import Sessions
from service.jobs.state import Stage
from service.jobs.tables import SelectionJob
from service.schema import upgrade
from service.settings import (
    ApiSettings,
    ArtifactSettings,
    BrokerSettings,
    DatabaseSettings,
    LedgerSettings,
    ModelSettings,
    WorkerSettings,
)
from service.tenants.service import create_key
from worker.compute import Compute
from worker.inprocess import LocalJob
from worker.units import job_inputs

Json = dict[str, Any]

SECRET = "integration-tests-only-0123456789abcdef"
# A lease so short that a killed worker's unit comes back within the test; a busy machine still beats in time.
LEDGER = LedgerSettings(lease_seconds=6, beat_seconds=0.5, sweep_seconds=0.5, retry_seconds=0.5)
PATIENCE = 180.0

MODEL = "tiny-llama"
POOL, LANDMARKS = 1_100, 150  # landmarks from more than one row group of the pool's tokens
SMALL, TARGET, BUDGET = 60, 16, 40
PARAMETERS: Json = {
    "landmarks": {"count": LANDMARKS},
    "embedding": {"blocks": 2},
    "gradient": {"projection_dim": 1024},
    "dtype": "float32",
    "max_length": 128,
}


def until(what: str, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Waits for the condition and returns what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} seconds"
        time.sleep(0.1)
    return found


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Worker:
    """A Celery worker in a process of its own, as the embedded stack starts it."""

    def __init__(self, settings: ApiSettings, log: Path, **worker: str) -> None:
        self.log = log
        groups = {"ledger": settings.ledger.model_dump(), "worker": {"device": "cpu", "threads": 1, **worker}}
        environment = {
            "WINNOW_DATABASE__URL": settings.database.url,
            "WINNOW_BROKER__URL": settings.broker.url,
            "WINNOW_ARTIFACTS__URL": settings.artifacts.url,
            "WINNOW_MODELS__FOLDER": str(settings.models.folder),
            **{f"WINNOW_{g}__{k}".upper(): str(v) for g, values in groups.items() for k, v in values.items()},
        }
        command = [sys.executable, "-m", "celery", "-A", "worker.celery_app", "worker", "-P", "threads", "-c", "1"]
        command += ["--without-gossip", "--without-mingle", "--loglevel", "INFO", "-n", f"{log.stem}@winnow"]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, **environment}, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def child(self) -> int | None:
        """The process id of its compute child."""
        children = psutil.Process(self.pid).children()
        return next((c.pid for c in children if "worker.compute" in " ".join(c.cmdline())), None)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def terminate(self) -> int:
        """Asks it to end, as the operator would, and waits: its exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=60)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.kill()


@dataclass(frozen=True)
class World:
    folder: Path
    settings: ApiSettings
    client: TestClient
    sessions: Sessions
    store: ArtifactStore

    @classmethod
    @contextmanager
    def made(cls, folder: Path, postgres_url: str, broker_url: str, *, number: int) -> Iterator[Self]:
        """`number` names the world's database, and the broker's logical one."""
        name = f"worker_{number}"
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        database = make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
        upgrade(database)
        (folder / "models").mkdir()
        settings = ApiSettings(
            database=DatabaseSettings(url=database, pool_size=2),
            broker=BrokerSettings(url=urlsplit(broker_url)._replace(path=f"/{number}").geturl()),
            artifacts=ArtifactSettings(url=str(folder / "store")),
            models=ModelSettings(folder=folder / "models"),
            ledger=LEDGER,
            secret_key=SecretStr(SECRET),
        )
        app = create_app(settings)
        with app.state.sessions.begin() as session:
            key = create_key(session, tenant_name="worker tests", key_name="test", secret_key=SECRET)
        with TestClient(app, headers={"Authorization": f"Bearer {key}"}) as client:
            yield cls(folder, settings, client, app.state.sessions, app.state.store)

    @contextmanager
    def worker(self, name: str, **worker: str) -> Iterator[Worker]:
        """A worker that is gone afterwards; `worker` are settings of it."""
        started = Worker(self.settings, self.folder / f"{name}.log", **worker)
        try:
            yield started
        finally:
            started.close()

    def upload(self, rows: list[Json]) -> str:
        content = "".join(json.dumps(row) + "\n" for row in rows)
        answer = self.client.post("/v1/datasets", params={"name": "rows"}, content=content)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def post(self, **request: Any) -> str:
        answer = self.client.post("/v1/selection-jobs", json=request)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def get(self, path: str, **params: Any) -> Json:
        answer = self.client.get(f"/v1/selection-jobs/{path}", params=params)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def ended(self, job_id: str) -> Json:
        """The job, once it is in a terminal state."""
        over = ("succeeded", "failed", "cancelled")
        return dict(until(job_id, lambda: job if (job := self.get(job_id))["status"] in over else None))

    def succeeded(self, job_id: str) -> Json:
        job = self.ended(job_id)
        assert job["status"] == "succeeded", job["error"]
        return job

    def computing(self, job_id: str, name: str = "embed") -> Json:
        """The job, once a unit of the stage has told of progress and goes on."""

        def midway() -> Json | None:
            job = self.get(job_id)
            assert job["status"] in ("queued", "running"), job
            report = stage(job, name)
            return job if report is not None and 0 < report["done"] < report["total"] else None

        return dict(until(f"{job_id} computing", midway))

    def selected(self, job_id: str) -> list[Json]:
        return list(self.get(f"{job_id}/selected", limit=1000)["data"])

    def events(self, job_id: str, kind: str | None = None) -> list[Json]:
        """All events of the job, or the data of those of one kind."""
        found = list(self.get(f"{job_id}/events", limit=1000)["data"])
        return found if kind is None else [event["data"] for event in found if event["type"] == kind]

    def forget(self, job_id: str) -> None:
        """Deletes what the job's units have left in the store, so that the same job computes all of it again."""
        for unit in self.get(f"{job_id}/provenance")["record"]["units"]:
            for key in (unit["artifact"], f"{unit['artifact']}.json"):
                self.store.delete(key)


def stage(job: Json, name: str) -> Json | None:
    return next((stage for stage in job["stages"] if stage["stage"] == name), None)


class Shared:
    """The worker of all tests that leave it alive; the others stop it, and who needs it next starts another."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._worker: Worker | None = None
        self._count = 0

    def running(self) -> Worker:
        if self._worker is None:
            self._count += 1
            self._worker = Worker(self._world.settings, self._world.folder / f"shared{self._count}.log")
        return self._worker

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None


def post(world: World, pool: str, target: str, **changes: Any) -> str:
    return world.post(**{"model": MODEL, "pool": pool, "target": target, "budget": BUDGET, **PARAMETERS, **changes})


def reference(world: World, job_id: str, folder: Path) -> dict[str, np.ndarray]:
    """The same job in this process, with a store of its own that holds the datasets only."""
    shutil.copytree(world.folder / "store" / "datasets", folder / "datasets")
    with world.sessions() as session:
        job = job_inputs(session, session.get_one(SelectionJob, job_id))
    settings = WorkerSettings(device="cpu", threads=1)
    compute = Compute(artifacts=str(folder), models=world.folder / "models", settings=settings)
    done = LocalJob(compute, job, Progress(disable=True)).run(POOL)
    with compute.store.local(done[Stage.SELECT][0].artifact_key) as path:
        return dict(load_file(path))


def same_selection(world: World, job_id: str, arrays: dict[str, np.ndarray]) -> None:
    found = world.selected(job_id)
    assert [row["index"] for row in found] == arrays["selected"].tolist()
    assert [row["weight"] for row in found] == pytest.approx(arrays["weight"][arrays["selected"]], abs=1e-4)
