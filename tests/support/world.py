"""The whole service, as integration tests use it: settings, the API as two tenants see it, workers, and what a user does."""

import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Self

import httpx
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, delete

from service.app import create_app
from service.auth.principal import Scope
from service.db.engine import Sessions, make_engine, make_sessions
from service.http.protocol import TimedHeads
from service.ids import new_id
from service.keys.service import create_key
from service.ledger import store_identity
from service.ledger.state import TERMINAL
from service.ledger.tables import StoreIdentity
from service.settings import ApiSettings
from service.storage.artifacts import ArtifactStore
from support.planned import PlannedAtOnce
from support.processes import Process, running
from support.servers import Servers, new_database
from support.waiting import PATIENCE, until

Json = dict[str, Any]

SECRET = "integration-tests-only-0123456789abcdef"
NOWHERE = "redis://127.0.0.1:1/0"  # nobody listens there
JOBS, DATASETS = "/v1/selection-jobs", "/v1/datasets"


def make_settings(
    database_url: str, folder: Path, *, broker_url: str = NOWHERE, pool_size: int = 2, **groups: Any
) -> ApiSettings:
    """With the store and the models in the folder; `groups` are further settings, or others, by name."""
    models = folder / "models"
    if "models" not in groups:
        models.mkdir(exist_ok=True)
    usual: Json = {
        "database": {"url": database_url, "pool_size": pool_size},
        "broker": {"url": broker_url},
        "artifacts": {"url": str(folder / "store")},
        "models": {"folder": models},
        "worker": {"device": "cpu", "threads": 1},
        "secret_key": SECRET,
    }
    return ApiSettings(**{**usual, **groups})


@contextmanager
def own_settings(servers: Servers, folder: Path, *, durable: bool = False, **more: Any) -> Iterator[ApiSettings]:
    """Of a service with a database and a broker that nobody else uses; `more` is for `make_settings`."""
    with new_database(servers.postgres.url, durable=durable) as database_url:
        yield make_settings(database_url, folder, **{"broker_url": servers.broker.new_url(), **more})


def pair(settings: ApiSettings) -> None:
    """What the dispatcher does first, where none runs: the store is marked as the database's, whichever that was before."""
    engine = make_engine(settings.database)
    sessions = make_sessions(engine)
    with sessions.begin() as session:
        session.execute(delete(StoreIdentity))
    store_identity.establish(sessions, ArtifactStore(settings.artifacts.url))
    engine.dispose()


def register_model(settings: ApiSettings, name: str = "small", **config: Any) -> Path:
    """A model that jobs may name, and that nobody can compute with: it has no weights."""
    folder = settings.models.folder / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 6, **config}))
    return folder


class User:
    """What a user of the API does by `client`, each call with success."""

    client: httpx.Client

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        answer = self.client.request(method, path, **request)
        assert answer.is_success, answer.text
        return answer

    def until(self, what: str, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        return until(what, condition, seconds)

    def get(self, path: str, **params: Any) -> Json:
        """`path` is a job's id, and what may follow it."""
        return dict(self.call("GET", f"{JOBS}/{path}", params=params).json())

    def upload(self, rows: list[Json], name: str = "rows") -> str:
        content = "".join(json.dumps(row) + "\n" for row in rows)
        return str(self.call("POST", DATASETS, params={"name": name}, content=content).json()["id"])

    def post(self, **request: Any) -> str:
        return str(self.call("POST", JOBS, json=request).json()["id"])

    def cancel(self, job_id: str) -> Json:
        return dict(self.call("POST", f"{JOBS}/{job_id}/cancel").json())

    def ended(self, job_id: str) -> Json:
        """The job, once it is in a terminal state."""
        return dict(
            self.until(f"{job_id} ends", lambda: job if (job := self.get(job_id))["status"] in TERMINAL else None)
        )

    def succeeded(self, job_id: str) -> Json:
        job = self.ended(job_id)
        assert job["status"] == "succeeded", job["error"]
        return job

    def selected(self, job_id: str) -> list[Json]:
        return list(self.get(f"{job_id}/selected", limit=1000)["data"])

    def events(self, job_id: str, kind: str) -> list[Json]:
        """The data of the job's events of the kind."""
        found = self.get(f"{job_id}/events", limit=1000)["data"]
        return [event["data"] for event in found if event["type"] == kind]


def stage(job: Json, name: str) -> Json | None:
    return next((stage for stage in job["stages"] if stage["stage"] == name), None)


@dataclass(frozen=True)
class World(User):
    """The API in this process; `client` and `other` send the keys of two new tenants."""

    app: FastAPI
    client: TestClient
    other: TestClient

    @classmethod
    @contextmanager
    def made(cls, settings: ApiSettings, *, runs: bool = False, **keys: Any) -> Iterator[Self]:
        """Only where it `runs` are there the dispatcher, the sweeper and the sender of webhooks beside it. A job has its plan
        when it is answered.

        Args:
            keys: what `of` takes.
        """
        app = create_app(settings)
        app.add_middleware(PlannedAtOnce)
        world = cls.of(app, **keys)
        try:
            if runs:
                with world.client:
                    yield world
            else:
                yield world
        finally:
            world.client.close()
            world.other.close()
            world.engine.dispose()
            world.app.state.metrics.close()

    @classmethod
    def of(
        cls,
        app: FastAPI,
        *,
        scopes: Collection[Scope] = (Scope.READ, Scope.SUBMIT),
        tenants: tuple[str, str] | None = None,
    ) -> Self:
        """As two new tenants see the application, or those that are named."""
        with app.state.sessions.begin() as session:
            keys = [
                create_key(session, tenant_name=name, key_name="test", secret_key=SECRET, scopes=scopes)
                for name in tenants or (new_id("tenant"), new_id("tenant"))
            ]
        client, other = (TestClient(app, headers={"Authorization": f"Bearer {key}"}) for key in keys)
        return cls(app, client, other)

    @property
    def settings(self) -> ApiSettings:
        return self.app.state.settings

    @property
    def engine(self) -> Engine:
        return self.app.state.engine

    @property
    def sessions(self) -> Sessions:
        return self.app.state.sessions

    @property
    def store(self) -> ArtifactStore:
        return self.app.state.store

    @property
    def key(self) -> str:
        return self.client.headers["Authorization"].removeprefix("Bearer ")

    @property
    def other_key(self) -> str:
        return self.other.headers["Authorization"].removeprefix("Bearer ")

    @property
    def folder(self) -> Path:
        return self.settings.models.folder.parent

    def worker(self, name: str, **environment: str) -> Any:
        """A context in which a worker process runs; `environment` holds settings of its own, as `WINNOW_...`."""
        return running(Process.worker(self.settings, self.folder / f"{name}.log", **environment))

    def computing(self, job_id: str, name: str = "embed") -> Json:
        """The job, once a unit of the stage has reported progress and goes on."""

        def midway() -> Json | None:
            job = self.get(job_id)
            assert job["status"] in ("queued", "running"), job
            report = stage(job, name)
            return job if report is not None and 0 < report["done"] < report["total"] else None

        return dict(self.until(f"{job_id} is computing", midway))


@contextmanager
def serving(app: Any, *, runs: bool = False, http: type[TimedHeads] = TimedHeads) -> Iterator[str]:
    """The URL of a server of the application on a free port of loopback."""
    lifespan = "on" if runs else "off"
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan=lifespan, http=http, log_level="error"))
    thread = Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "it did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
