"""An upgrade while the service is used: the API of the version before serves on during the migration, and after it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import text
from support.later_migrations import FIRST, HEAD, later_version
from support.ledger_world import new_database, wait_until

from service import ledger
from service.db.engine import Sessions, make_engine, make_sessions
from service.db.migrate import upgrade
from service.keys.service import create_key
from service.local.process_group import free_port
from service.settings import ApiSettings, ArtifactSettings, BrokerSettings, DatabaseSettings, ModelSettings

ROOT = Path(__file__).parents[3]
SECRET = "integration-tests-only-0123456789abcdef"


@contextmanager
def serving(settings: ApiSettings, log: Path) -> Iterator[str]:
    """The URL of an API in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "service.app:create_app", "--factory", "--port", str(port)]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("WINNOW_")},
        "PYTHONPATH": str(ROOT),
        "WINNOW_DATABASE__URL": settings.database.url,
        "WINNOW_BROKER__URL": settings.broker.url,
        "WINNOW_ARTIFACTS__URL": settings.artifacts.url,
        "WINNOW_MODELS__FOLDER": str(settings.models.folder),
        "WINNOW_LEDGER__SWEEP_SECONDS": "0.2",
        "WINNOW_SECRET_KEY": SECRET,
    }
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            return httpx.get(f"{url}/readyz").is_success
        except httpx.HTTPError:
            return False

    try:
        wait_until(is_ready, 120, "the API is ready")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


@dataclass
class Traffic:
    """A client that uploads, posts, polls, lists and cancels without a pause, and keeps what was answered."""

    client: httpx.Client
    answers: list[tuple[str, str, int]] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    rounds: int = 0
    error: BaseException | None = None
    stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.run)

    def stop(self) -> None:
        self.stopping.set()
        self.thread.join()

    def call(self, method: str, path: str, **options: Any) -> Any:
        answer = self.client.request(method, f"/v1/{path}", **options)
        self.answers.append((method, path, answer.status_code))
        return answer.json()

    def round(self) -> None:
        rows = "".join(json.dumps({"text": f"sample {self.rounds} {i}"}) + "\n" for i in range(4))
        dataset = self.call("POST", "datasets", params={"name": "rows"}, content=rows)["id"]
        request = {"model": "tiny", "pool": dataset, "target": dataset, "budget": 2, "landmarks": {"count": 2}}
        request |= {"embedding": {"kind": "hidden", "blocks": 1}}
        job_id = self.call("POST", "selection-jobs", json=request)["id"]
        self.jobs.append(job_id)
        assert self.call("GET", f"selection-jobs/{job_id}")["id"] == job_id
        assert job_id in [job["id"] for job in self.call("GET", "selection-jobs")["data"]]
        assert self.call("GET", f"selection-jobs/{job_id}/events")["data"][0]["type"] == "job.queued"
        if self.rounds % 2:
            assert self.call("POST", f"selection-jobs/{job_id}/cancel")["status"] == "cancelled"
        self.rounds += 1

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self.round()
        except BaseException as error:  # raised in the test, not in the thread
            self.error = error

    def more(self, rounds: int) -> None:
        """Waits until so many rounds more are through."""
        wanted = self.rounds + rounds
        wait_until(lambda: self.rounds >= wanted or self.error, 120, f"{rounds} rounds of requests")
        assert self.error is None, (self.error, self.answers[-3:])


@contextmanager
def traffic(url: str, key: str) -> Iterator[Traffic]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        made = Traffic(client)
        made.thread.start()
        try:
            yield made
        finally:
            made.stop()


@pytest.mark.slow
def test_the_version_before_serves_on_while_the_database_is_migrated(
    postgres_url: str, broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.db.migrate._LOCK_SECONDS", 1.5)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    config = {"model_type": "llama", "num_hidden_layers": 2}
    (tmp_path / "models" / "tiny" / "config.json").write_text(json.dumps(config))
    with new_database(postgres_url) as database, later_version(tmp_path / "migrations"):
        settings = ApiSettings(
            database=DatabaseSettings(url=database, pool_size=2),
            broker=BrokerSettings(url=urlsplit(broker_url)._replace(path="/8").geturl()),
            artifacts=ArtifactSettings(url=str(tmp_path / "store")),
            models=ModelSettings(folder=tmp_path / "models"),
            secret_key=SecretStr(SECRET),
        )
        engine = make_engine(settings.database)
        sessions = make_sessions(engine)
        with sessions.begin() as session:
            key = create_key(session, tenant_name="deploys", key_name="test", secret_key=SECRET)
        reasons: list[str] = []
        with serving(settings, tmp_path / "api.log") as url, traffic(url, key) as users:
            users.more(3)
            before = len(users.jobs)
            with engine.connect() as report:
                # A long query on the jobs: the migration waits behind it, all others behind the migration.
                report.execute(text("SELECT count(*) FROM selection_jobs"))

                def notify(reason: str) -> None:
                    reasons.append(reason)
                    users.more(2)  # it has given way: all that had queued behind it go on
                    if len(reasons) == 2:
                        report.rollback()

                standing = upgrade(database, notify=notify)
            during = len(users.jobs)
            users.more(3)
            ready = httpx.get(f"{url}/readyz")
            released = work(sessions)
            users.stop()
            for number, job_id in enumerate(users.jobs):
                job = users.call("GET", f"selection-jobs/{job_id}")
                ran = "running" if job_id == released else "queued"
                assert job["status"] == ("cancelled" if number % 2 else ran)
        engine.dispose()
        assert (standing.current, standing.newest, len(reasons)) == (FIRST, HEAD, 2)
        assert users.error is None
        assert [answer for answer in users.answers if answer[2] not in (200, 201, 202)] == []
        assert 0 < before < during < len(users.jobs)
        assert ready.status_code == 200, "the version before serves on, and says so"


def work(sessions: Sessions) -> str:
    """What a worker of the version before does; the job."""
    with sessions.begin() as session:
        claim = ledger.claim_unit(session, worker_id="before", lease_seconds=60)
    assert claim is not None
    with sessions.begin() as session:
        ledger.beat(session, claim, lease_seconds=60, done=1)
    with sessions.begin() as session:
        ledger.release_unit(session, claim, reason="the worker shuts down")
    return claim.job_id
