"""The whole service in real processes that a test kills and restarts: the API by uvicorn, workers by Celery, over a database,
a queue and an artifact store of their own."""

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import psutil
from audit import MARKER, audit, leftovers, marked
from faults import Faults
from pydantic import SecretStr
from servers import Servers, free_port
from tiny import pool_rows, save_model, target_rows

from service.database import make_engine, make_sessions
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

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
SECRET = "chaos-tests-only-0123456789abcdef0123456789"
# So short that what a killed process held comes back within the test; a busy machine still beats in time.
LEDGER = LedgerSettings(lease_seconds=3, beat_seconds=0.3, sweep_seconds=0.3, retry_seconds=0.2, cancel_seconds=10)
PATIENCE = 180.0

MODEL = "tiny-llama"
POOL, TARGET, BUDGET = 60, 6, 10
JOB: Json = {
    "model": MODEL,
    "budget": BUDGET,
    "landmarks": {"count": 20},
    "embedding": {"blocks": 2},
    "dtype": "float32",
    "max_length": 128,
}
TERMINAL = ("succeeded", "failed", "cancelled")
_GONE = (httpx.TransportError,)
_AWAY = (502, 503, 504)


class Process:
    """A process that can be started again under the same command and environment."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._command = [sys.executable, "-m", *arguments]
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as file:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=ROOT,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def children(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.pid).children(recursive=True)] if self.is_alive else []

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, as the kernel's out-of-memory killer sends it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM, as an operator's supervisor sends it: the exit status."""
        assert self._process is not None
        if self.is_alive:
            self._process.terminate()
        try:
            return self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


class World:
    """`api` and `workers` run; `client` speaks to the API as the one tenant."""

    def __init__(self, folder: Path, settings: ApiSettings, key: str) -> None:
        self.folder = folder
        self.settings = settings
        self.marker = uuid.uuid4().hex
        self.faults = Faults(folder / "faults")
        self.port = free_port()
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers={"Authorization": f"Bearer {key}"}, timeout=30
        )
        self.workers: list[Process] = []
        listen = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.api = Process(
            ["uvicorn", "service.app:create_app", "--factory", *listen, "--timeout-graceful-shutdown", "5"],
            self._environment(WINNOW_SECRET_KEY=SECRET),
            folder / "api.log",
        )

    @classmethod
    @contextmanager
    def made(cls, servers: Servers) -> Iterator[Self]:
        """Runs an API and no worker yet."""
        servers.worlds += 1
        number = servers.worlds
        folder = servers.folder / f"world{number}"
        save_model(folder / "models" / MODEL)
        database = servers.postgres.create(f"chaos_{number}")
        upgrade(database)
        settings = ApiSettings(
            database=DatabaseSettings(url=database, pool_size=2),
            broker=BrokerSettings(url=urlsplit(servers.broker.url)._replace(path=f"/{number}").geturl()),
            artifacts=ArtifactSettings(url=str(folder / "store")),
            models=ModelSettings(folder=folder / "models"),
            ledger=LEDGER,
            worker=WorkerSettings(device="cpu", threads=1, cancel_grace_seconds=3),
            secret_key=SecretStr(SECRET),
        )
        engine = make_engine(settings.database)
        with make_sessions(engine).begin() as session:
            key = create_key(session, tenant_name="chaos", key_name="test", secret_key=SECRET)
        engine.dispose()
        world = cls(folder, settings, key)
        try:
            yield world
        finally:
            world.close()

    @property
    def database_url(self) -> str:
        """For psycopg."""
        return self.settings.database.url.replace("+psycopg", "", 1)

    @property
    def store(self) -> Path:
        return Path(self.settings.artifacts.url)

    def _environment(self, **more: str) -> dict[str, str]:
        of_settings = self.settings.model_dump(mode="json", include={"database", "broker", "artifacts", "models"})
        groups = {
            **of_settings,
            "ledger": self.settings.ledger.model_dump(),
            "worker": self.settings.worker.model_dump(),
        }
        return {
            **{f"WINNOW_{g}__{k}".upper(): str(v) for g, values in groups.items() for k, v in values.items()},
            **self.faults.environment,
            "OMP_NUM_THREADS": "1",
            MARKER: self.marker,
            **more,
        }

    def add_worker(self, **environment: str) -> Process:
        name = f"worker{len(self.workers) + 1}"
        arguments = ["celery", "-A", "worker.celery_app", "worker", "-P", "threads", "-c", "1", "--without-gossip"]
        arguments += ["--without-mingle", "--loglevel", "INFO", "-n", f"{name}@winnow"]
        started = Process(arguments, self._environment(**environment), self.folder / f"{name}.log")
        self.workers.append(started)
        return started

    @property
    def processes(self) -> list[Process]:
        return [self.api, *self.workers]

    def revive(self) -> None:
        """Starts again what has died, as an operator's supervisor does."""
        for process in self.processes:
            if not process.is_alive:
                process.start()

    def restart(self, *processes: Process) -> None:
        """Stops the processes (all, where none is named) in good order and starts them again."""
        chosen = processes or self.processes
        for process in chosen:
            process.stop()
        for process in chosen:
            process.start()

    def close(self) -> None:
        self.client.close()
        for process in reversed(self.processes):
            process.stop()

    def until(self, what: str, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """Waits for the condition and returns what it gave; what dies meanwhile is started again."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what}: not within {seconds} seconds\n{self.logs()}"
            self.revive()
            time.sleep(0.05)
        return found

    def logs(self) -> str:
        """The end of what each process has logged."""
        ends = {process.log.name: process.log.read_text(errors="replace")[-2000:] for process in self.processes}
        return "\n".join(f"--- {name}\n{end}" for name, end in ends.items())

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The answer, as a client gets it that repeats the call while there is none, or one that says: come again."""

        def answered() -> httpx.Response | None:
            try:
                answer = self.client.request(method, path, **request)
            except _GONE:
                return None
            return None if answer.status_code in _AWAY else answer

        answer: httpx.Response = self.until(f"{method} {path}", answered)
        assert answer.is_success, answer.text
        return answer

    def get(self, path: str, **params: Any) -> Json:
        return dict(self.call("GET", f"/v1/selection-jobs/{path}", params=params).json())

    def upload(self, rows: list[Json]) -> str:
        content = "".join(json.dumps(row) + "\n" for row in rows)
        return str(self.call("POST", "/v1/datasets", params={"name": "rows"}, content=content).json()["id"])

    def post(self, pool: str, target: str, **changes: Any) -> str:
        body = {**JOB, "pool": pool, "target": target, **changes}
        return str(self.call("POST", "/v1/selection-jobs", json=body).json()["id"])

    def submit(self, **changes: Any) -> str:
        """Uploads the pool and the target and posts the job of all scenarios."""
        pool, target = self.upload(pool_rows(POOL)), self.upload(target_rows(TARGET, "python_function"))
        return self.post(pool, target, **changes)

    def ended(self, job_id: str) -> Json:
        """The job, once it is in a terminal state."""
        return dict(
            self.until(job_id, lambda: job if (job := self.get(job_id))["status"] in TERMINAL else None),
        )

    def job_ids(self) -> list[str]:
        """Of all jobs that are not deleted; a client that repeated its POST has more than one."""
        jobs = self.call("GET", "/v1/selection-jobs", params={"limit": 100}).json()["data"]
        return [job["id"] for job in jobs]

    def selection(self, job_id: str) -> Json:
        """What the job has found, to the bit: the rows that were selected, and the root over the weights of all samples."""
        return {
            "selected": self.get(f"{job_id}/selected", limit=1000)["data"],
            "weights": self.get(f"{job_id}/weights", limit=1000)["data"],
            "weights_root": self.get(f"{job_id}/provenance")["weights_root"],
        }

    def events(self, job_id: str, kind: str) -> list[Json]:
        """The data of the job's events of the kind."""
        found = self.get(f"{job_id}/events", limit=1000)["data"]
        return [event["data"] for event in found if event["type"] == kind]

    def clear(self) -> None:
        """Deletes all jobs, datasets and artifacts, so that the same job computes everything again; not what killed writers have
        left, which is the sweepers' to remove."""
        self.faults.disarm()
        for job_id in self.job_ids():
            if self.get(job_id)["status"] not in TERMINAL:
                self.call("POST", f"/v1/selection-jobs/{job_id}/cancel")
                self.ended(job_id)
            self.call("DELETE", f"/v1/selection-jobs/{job_id}")
        for dataset in self.call("GET", "/v1/datasets", params={"limit": 100}).json()["data"]:
            self.call("DELETE", f"/v1/datasets/{dataset['id']}")
        for folder in self.store.glob("*"):
            if folder.name != "tmp":
                shutil.rmtree(folder, ignore_errors=True)  # the API is removing the datasets
        self.faults.forget()

    def audit(self, *, swept: bool = True) -> None:
        """Everything that must hold once all jobs have ended, whatever was killed meanwhile. With `swept` the store is also rid
        of what killed writers have left."""
        if swept:
            self.sweep()
        self.until("only what should run runs", lambda: not self.orphans(), 30)
        audit(self.database_url, self.store, self.marker, alive=self.pids())

    def sweep(self) -> None:
        """Has what killed writers have left in the store swept, by starting again what runs, if there is any."""
        if leftovers(self.store):
            self.restart()
            self.until("the store's temporary files are swept", lambda: not leftovers(self.store), 30)

    def orphans(self) -> list[int]:
        expected = self.pids()
        return [pid for pid in marked(self.marker) if pid not in expected]

    def pids(self) -> set[int]:
        """Of the processes that should run: those started here, and their children."""
        return {pid for process in self.processes for pid in (process.pid, *process.children())}
