"""The whole service in real processes that a test kills and restarts, over a database, a queue and a store of its own."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
from audit import MARKER, audit, leftovers
from faults import Faults
from support.processes import Process, having
from support.servers import Servers, free_port
from support.tiny import pool_rows, save_model, target_rows
from support.waiting import PATIENCE, until
from support.world import DATASETS, JOBS, SECRET, Json, User, own_settings

from service.db.engine import make_engine, make_sessions
from service.ids import new_id
from service.keys.service import create_key
from service.ledger.state import TERMINAL
from service.settings import ApiSettings, LedgerSettings

# So short that what a killed process held comes back within the test; a busy machine still beats in time.
LEDGER = LedgerSettings(lease_seconds=3, beat_seconds=0.3, sweep_seconds=0.3, retry_seconds=0.2, cancel_seconds=10)

MODEL = "tiny-llama"
POOL, TARGET, BUDGET = 60, 6, 10
JOB: Json = {
    "model": MODEL,
    "budget": BUDGET,
    "landmarks": {"count": 20},
    "refine": {"rounds": 2},
    "dtype": "float32",
    "max_length": 128,
}
_AWAY = (502, 503, 504)
_UNSEEN = [{"type": "function", "function": {"name": "unseen", "description": "x" * 40_000}}]


def wide_rows() -> list[Json]:
    """The pool of all scenarios: two units tokenise it, as fast as its plain rows, since the template shows no tools."""
    return [{**row, "tools": _UNSEEN} for row in pool_rows(POOL)]


class World(User):
    """`api` and `workers` run; `client` speaks to the API as the one tenant, and repeats what gets no answer."""

    def __init__(self, folder: Path, settings: ApiSettings, key: str, environment: dict[str, str]) -> None:
        self.folder = folder
        self.settings = settings
        self.marker = uuid.uuid4().hex
        self.faults = Faults(folder / "faults")
        port = free_port()
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, timeout=30
        )
        self.workers: list[Process] = []
        self._environment = {**self.faults.environment, MARKER: self.marker, **environment}
        grace = ("--timeout-graceful-shutdown", "5")
        self.api = Process.api(settings, port, folder / "api.log", *grace, **self._environment)

    @classmethod
    @contextmanager
    def made(cls, servers: Servers, ledger: LedgerSettings = LEDGER, **environment: str) -> Iterator[Self]:
        """Runs an API and no worker yet; all its processes have the environment."""
        folder = servers.folder / new_id("world")
        save_model(folder / "models" / MODEL)
        worker = {"device": "cpu", "threads": 1, "cancel_grace_seconds": 3}
        with own_settings(servers, folder, durable=True, ledger=ledger, worker=worker) as settings:
            engine = make_engine(settings.database)
            with make_sessions(engine).begin() as session:
                key = create_key(session, tenant_name="chaos", key_name="test", secret_key=SECRET)
            engine.dispose()
            world = cls(folder, settings, key, environment)
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

    def add_worker(self, **environment: str) -> Process:
        log = self.folder / f"worker{len(self.workers) + 1}.log"
        started = Process.worker(self.settings, log, **self._environment, **environment)
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
        """As of all users; what dies meanwhile is started again."""

        def holds() -> Any:
            found = condition()
            if not found:
                self.revive()
            return found

        try:
            return until(what, holds, seconds)
        except AssertionError as error:
            error.add_note(self.logs())
            raise

    def logs(self) -> str:
        """The end of what each process has logged."""
        ends = {process.log.name: process.log.read_text(errors="replace")[-2000:] for process in self.processes}
        return "\n".join(f"--- {name}\n{end}" for name, end in ends.items())

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The answer, as a client gets it that repeats the call while there is none, or one that says: come again."""

        def answered() -> httpx.Response | None:
            try:
                answer = self.client.request(method, path, **request)
            except httpx.TransportError:
                return None
            return None if answer.status_code in _AWAY else answer

        answer: httpx.Response = self.until(f"{method} {path}", answered)
        assert answer.is_success, answer.text
        return answer

    def submit(self, **changes: Any) -> str:
        """Uploads the pool and the target and posts the job of all scenarios."""
        pool, target = self.upload(wide_rows()), self.upload(target_rows(TARGET, "python_function"))
        return self.post_usual(pool, target, **changes)

    def post_usual(self, pool: str, target: str, **changes: Any) -> str:
        return self.post(**{**JOB, "pool": pool, "target": target, **changes})

    def job_ids(self) -> list[str]:
        """Of all jobs that are not deleted; a client that repeated its POST has more than one."""
        jobs = self.call("GET", JOBS, params={"limit": 100}).json()["data"]
        return [job["id"] for job in jobs]

    def selection(self, job_id: str) -> Json:
        """What the job has found, to the bit: the rows that were selected, and the root over the weights of all samples."""
        return {
            "selected": self.selected(job_id),
            "weights": self.get(f"{job_id}/weights", limit=1000)["data"],
            "weights_root": self.get(f"{job_id}/provenance")["weights_root"],
        }

    def clear(self) -> None:
        """Deletes all jobs, datasets and artifacts, so that the same job computes everything again; not what killed writers have
        left, which is the sweepers' to remove."""
        self.faults.disarm()
        for job_id in self.job_ids():
            if self.get(job_id)["status"] not in TERMINAL:
                self.cancel(job_id)
                self.ended(job_id)
            self.call("DELETE", f"{JOBS}/{job_id}")
        for dataset in self.call("GET", DATASETS, params={"limit": 100}).json()["data"]:
            self.call("DELETE", f"{DATASETS}/{dataset['id']}")
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
        return [pid for pid in having(MARKER, self.marker) if pid not in expected]

    def pids(self) -> set[int]:
        """Of the processes that should run: those started here, and their children."""
        return {pid for process in self.processes for pid in (process.pid, *process.children())}
