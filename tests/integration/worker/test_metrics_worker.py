"""What Prometheus reads of a worker: how its units and its compute processes ended."""

import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import text
from support.ledger_world import LedgerWorld, ledger_world, unit, wait_until
from support.metrics_world import SOON, Samples, read, samples, settings_of, value
from support.servers import Servers, free_port
from support.tiny import pool_rows
from support.waiting import until
from support.worker_jobs import MODEL, computing_world
from support.world import pair, register_model

from service import ledger
from service.plan.stages import Stage
from service.settings import ApiSettings, LedgerSettings, WorkerSettings
from service.storage.artifacts import ArtifactStore
from worker.metrics import PortTaken, WorkerMetrics
from worker.supervisor import Supervisor


@pytest.fixture(scope="module")
def _database(postgres_url: str) -> Iterator[LedgerWorld]:
    with ledger_world(postgres_url) as world:
        yield world


@pytest.fixture
def world(_database: LedgerWorld) -> LedgerWorld:
    _database.empty()
    return _database


@pytest.fixture
def of_world(world: LedgerWorld, broker_url: str, tmp_path: Path) -> ApiSettings:
    settings = settings_of(world, broker_url, tmp_path)
    pair(settings)
    register_model(settings, "none")  # what the world's jobs name
    return settings


@pytest.fixture
def unused_port() -> int:
    return free_port()


def counted(supervisor: Supervisor) -> Samples:
    return read(supervisor._metrics.registry)


@contextmanager
def supervising(settings: ApiSettings) -> Iterator[Supervisor]:
    supervisor = Supervisor(settings)
    try:
        yield supervisor
    finally:
        supervisor.close()


@pytest.mark.slow
def test_units_are_counted_by_how_they_ended(world: LedgerWorld, of_world: ApiSettings) -> None:
    store = ArtifactStore(of_world.artifacts.url)
    world.job(unit(Stage.EMBED, 0, key="made"), unit(Stage.EMBED, 1, key="also"))
    world.job(unit(Stage.VALIDATE, key="nothing"))
    for key in ("made", "also"):
        store.write_json(f"{key}.json", {"files": []})
    # No second attempt is due before the first ones have ended, however slow the machine is.
    ledger = of_world.ledger.model_copy(update={"retry_seconds": 3600.0})
    with supervising(of_world.model_copy(update={"ledger": ledger})) as supervisor:
        supervisor.run_until_idle()
        found = counted(supervisor)
    ended = {key[1]: count for key, count in found.items() if key[0] == "winnow_worker_units_total"}
    outcomes = {tuple(sorted(labels)): count for labels, count in ended.items()}
    assert value(found, "worker_units_total", stage="embed", outcome="reused", code="") == 1, outcomes
    # The last of a wave plans the next, of which this job of no model has none; `validate` finds no model.
    assert value(found, "worker_units_total", stage="embed", outcome="failed", code="internal_error") == 1, outcomes
    assert value(found, "worker_units_total", stage="validate", outcome="failed", code="internal_error") == 1, outcomes
    assert value(found, "worker_units_running", stage="embed") == 0
    assert not any(name.startswith("winnow_worker_unit_seconds") for name, _ in found), "nothing was computed"


def test_a_child_that_dies_is_counted_by_its_cause(world: LedgerWorld, of_world: ApiSettings) -> None:
    world.job(unit(Stage.PREPARE, total=1))
    with supervising(of_world) as supervisor:
        thread = threading.Thread(target=supervisor.run_until_idle)
        thread.start()
        wait_until(lambda: supervisor._compute.current is not None, SOON, "a child")
        assert value(counted(supervisor), "worker_units_running", stage="prepare") == 1
        supervisor._compute.current._process.kill()
        thread.join(SOON)
        found = counted(supervisor)
    assert value(found, "worker_child_starts_total") == 1
    assert value(found, "worker_child_deaths_total", cause="SIGKILL") == 1
    assert value(found, "worker_units_total", stage="prepare", outcome="failed", code="compute_died") == 1


def test_a_lost_lease_and_samples_are_counted(
    world: LedgerWorld, of_world: ApiSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child is one that only talks: what is counted is the supervisor's."""

    class Talking:
        death, is_alive = None, True

        def __init__(self, *_: Any, **__: Any) -> None:
            self._messages: Iterator[Any] = iter(())

        def send(self, **message: Any) -> None:
            if message["type"] == "run":
                self._messages = self._talk()

        def _talk(self) -> Iterator[Any]:
            for done in (3, 7):
                yield {"type": "progress", "done": done}
            world.lose_lease(claims[0])
            world.expire()
            while True:
                yield {"type": "cancelled"}

        def receive(self, timeout: float) -> Any:
            return next(self._messages)

        def close(self, grace_seconds: float) -> None: ...

        stop = close

    claims: list[ledger.Claim] = []
    monkeypatch.setattr("worker.process.warm_process.ComputeProcess", Talking)
    settings = of_world.model_copy(update={"ledger": LedgerSettings(beat_seconds=0.01)})
    world.job(unit(Stage.PREPARE, total=10))
    with supervising(settings) as supervisor:
        work = supervisor._claim()
        assert work is not None
        claims.append(work.claim)
        supervisor._do(work)
        found = counted(supervisor)
    assert value(found, "worker_samples_total", stage="prepare") == 7
    assert value(found, "worker_units_total", stage="prepare", outcome="lease_lost", code="") == 1


def test_the_worker_answers_on_its_port_and_two_cannot_share_one(of_world: ApiSettings, unused_port: int) -> None:
    settings = of_world.model_copy(update={"worker": WorkerSettings(metrics_port=unused_port)})
    with supervising(settings) as supervisor:
        supervisor.start()
        assert value(scraped(unused_port), "worker_child_starts_total") == 0
        listening = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert {address.ip for address in listening if address.port == unused_port} == {"127.0.0.1"}
        with pytest.raises(PortTaken, match=r"WINNOW_WORKER__METRICS_PORT: port \d+ of 127.0.0.1 is not available"):
            WorkerMetrics().serve("127.0.0.1", unused_port, lambda: None)


def test_what_a_worker_gives_back_and_beats_that_the_database_missed_are_counted(
    world: LedgerWorld, of_world: ApiSettings
) -> None:
    """Its child stands still, so that it neither ends nor heeds that it is to stop."""
    settings = of_world.model_copy(
        update={
            "ledger": LedgerSettings(beat_seconds=0.05),
            "worker": WorkerSettings(device="cpu", threads=1, cancel_grace_seconds=0.2),
        }
    )
    world.job(unit(Stage.PREPARE, total=1))
    with supervising(settings) as supervisor:
        thread = threading.Thread(target=supervisor.run_until_idle)
        thread.start()
        wait_until(lambda: supervisor._compute.current is not None, SOON, "a child")
        os.kill(supervisor._compute.current.pid, signal.SIGSTOP)
        assert value(counted(supervisor), "worker_heartbeats_missed_total") == 0
        with world.engine.begin() as connection:
            connection.execute(text("ALTER TABLE job_units RENAME TO job_units_away"))
        try:
            wait_until(
                lambda: value(counted(supervisor), "worker_heartbeats_missed_total") >= 1, SOON, "a beat is missed"
            )
        finally:
            with world.engine.begin() as connection:
                connection.execute(text("ALTER TABLE job_units_away RENAME TO job_units"))
        supervisor.stop()
        thread.join(SOON)
        found = counted(supervisor)
    assert value(found, "worker_units_total", stage="prepare", outcome="released", code="") == 1
    assert value(found, "worker_child_deaths_total", cause="stopped") == 1


def test_a_child_that_makes_room_for_another_model_is_told_from_one_that_was_killed(of_world: ApiSettings) -> None:
    quick = WorkerSettings(device="cpu", threads=1, cancel_grace_seconds=0.2)
    with supervising(of_world.model_copy(update={"worker": quick})) as supervisor:
        for name in ("one", "another", "another"):
            child = supervisor._compute.holding({"kind": "registered", "name": name})
        assert value(counted(supervisor), "worker_child_starts_total") == 2
        child._process.kill()
        child._process.wait()
        supervisor._compute.holding({"kind": "registered", "name": "another"})
        found = counted(supervisor)
    assert value(found, "worker_child_starts_total") == 3
    deaths = {dict(labels)["cause"]: count for (name, labels), count in found.items() if "child_deaths" in name}
    assert deaths == {"other_model": 1, "SIGKILL": 1}


@pytest.mark.slow
def test_a_job_is_read_at_the_port_of_its_worker_which_no_other_can_have(
    servers: Servers, tmp_path: Path, tiny_llama: Path, unused_port: int
) -> None:
    port = {"WINNOW_WORKER__METRICS_PORT": str(unused_port)}
    with computing_world(servers, tmp_path, tiny_llama) as made:
        ids = {"pool": made.upload(pool_rows(12)), "target": made.upload(pool_rows(3))}
        with made.worker("first", **port) as worker:
            job = made.succeeded(made.post(**ids, model=MODEL, budget=3, method="random", max_length=64))
            with made.worker("second", **port) as second:
                assert second.wait() == os.EX_CONFIG
            message = f"WINNOW_WORKER__METRICS_PORT: port {unused_port} of 127.0.0.1 is not available"
            assert message in second.log.read_text()

            def all_counted() -> Samples | None:  # the last is counted after the job has ended
                found = scraped(unused_port)
                return found if value(found, "worker_units_total", **succeeded("validate")) else None

            found = until("the worker has counted the last unit", all_counted)
            assert worker.is_alive
    stages = {report["stage"] for report in job["stages"]}
    assert stages >= {"prepare", "select", "validate"}
    ended = {frozenset(labels): count for (name, labels), count in found.items() if name == "winnow_worker_units_total"}
    assert ended == {frozenset(succeeded(stage).items()): 1 for stage in stages}
    for stage in stages:
        assert value(found, "worker_unit_seconds_count", stage=stage) == 1
        assert value(found, "worker_unit_seconds_sum", stage=stage) > 0
        assert value(found, "worker_units_running", stage=stage) == 0
    assert value(found, "worker_samples_total", stage="prepare") == 15
    assert value(found, "worker_child_starts_total") == 1


def succeeded(stage: str) -> dict[str, str]:
    return {"stage": stage, "outcome": "succeeded", "code": ""}


def scraped(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SOON) as answer:
        return samples(answer.read().decode())
