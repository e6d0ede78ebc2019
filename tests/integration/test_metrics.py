"""What Prometheus reads of the API and of a worker; and that dashboard and alerts ask for nothing else."""

import json
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from conftest import SECRET, Api
from ledger_world import LedgerWorld, ledger_world, unit, wait_until
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from pydantic import SecretStr
from sqlalchemy import text
from worker_world import Worker

from service.artifacts import ArtifactStore
from service.dispatch import CHANNEL, QUEUE, Dispatcher
from service.jobs import ledger, repository
from service.jobs.state import Stage
from service.observability.exposition import ApiMetrics, LedgerCollector
from service.observability.metrics import DispatchMetrics
from service.settings import (
    ApiSettings,
    ArtifactSettings,
    BrokerSettings,
    DatabaseSettings,
    LedgerSettings,
    ModelSettings,
    WorkerSettings,
)
from worker.metrics import PortTaken, WorkerMetrics
from worker.supervisor import Supervisor

OPS = Path(__file__).parents[2] / "ops"
SOON = 60.0
NOWHERE = "127.0.0.1:1"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(exposition: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((f"winnow_{name}", frozenset(labels.items())))


def read(registry: CollectorRegistry) -> Samples:
    return samples(generate_latest(registry).decode())


@pytest.fixture(scope="module")
def _database(postgres_url: str) -> Iterator[LedgerWorld]:
    with ledger_world(postgres_url) as world:
        yield world


@pytest.fixture
def world(_database: LedgerWorld) -> LedgerWorld:
    _database.empty()
    with _database.engine.begin() as connection:
        connection.execute(text("DELETE FROM worker_processes"))
    return _database


@pytest.fixture
def of_world(world: LedgerWorld, broker_url: str, tmp_path: Path) -> ApiSettings:
    return ApiSettings(
        database=DatabaseSettings(url=world.url, pool_size=2),
        broker=BrokerSettings(url=broker_url),
        artifacts=ArtifactSettings(url=str(tmp_path)),
        models=ModelSettings(folder=tmp_path),
        ledger=LedgerSettings(sweep_seconds=0.2, cancel_seconds=0.1),
        worker=WorkerSettings(device="cpu", threads=1),
        secret_key=SecretStr(SECRET),
    )


@contextmanager
def collecting(settings: ApiSettings, cache_seconds: float = 0) -> Iterator[CollectorRegistry]:
    registry = CollectorRegistry()
    collector = LedgerCollector(settings, cache_seconds=cache_seconds)
    registry.register(collector)
    yield registry
    collector.close()


# The API


def test_requests_are_counted_by_the_template_of_their_route(api: Api) -> None:
    job_ids = ["job_" + letter * 26 for letter in "ab"]
    for path in (*(f"/v1/selection-jobs/{job_id}" for job_id in job_ids), "/v1/datasets", "/nowhere/x", "/nowhere/y"):
        api.client.get(path)
    api.client.put("/healthz")
    api.client.request("BREW", "/healthz")
    answer = api.client.get("/metrics", headers={"Authorization": ""})  # no key is needed
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = samples(answer.text)
    template = "/v1/selection-jobs/{job_id}"
    assert value(found, "http_requests_total", method="GET", route=template, status="404") == 2
    assert value(found, "http_requests_total", method="GET", route="/v1/datasets", status="200") == 1
    assert value(found, "http_requests_total", method="GET", route="(none)", status="404") == 2
    assert value(found, "http_requests_total", method="PUT", route="/healthz", status="405") == 1
    assert value(found, "http_requests_total", method="other", route="/healthz", status="405") == 1
    assert value(found, "http_request_seconds_count", method="GET", route=template) == 2
    assert value(found, "http_requests_in_flight") == 1, "this one"
    assert not any(secret in answer.text for secret in (*job_ids, "nowhere", "tnt_", "BREW"))


def test_a_crash_is_counted_as_what_the_client_gets(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("service.datasets.service.page", crash)
    with pytest.raises(RuntimeError, match="broken"):
        api.client.get("/v1/datasets")  # the test's client raises what a real one gets as 500
    found = samples(api.client.get("/metrics").text)
    assert value(found, "http_requests_total", method="GET", route="/v1/datasets", status="500") == 1


def test_it_is_documented(api: Api) -> None:
    document = api.client.get("/openapi.json").json()
    operation = document["paths"]["/metrics"]["get"]
    assert "security" not in operation
    assert list(operation["responses"]["200"]["content"]) == ["text/plain"]


# What the ledger holds


def test_jobs_units_and_workers_as_the_ledger_has_them(world: LedgerWorld, of_world: ApiSettings) -> None:
    done, running, cancelling = world.job(), world.job(unit(Stage.EMBED, 0), unit(Stage.EMBED, 1)), world.job()
    world.finish(world.claim())
    claim = world.claim()
    assert claim.job_id == running
    world.cancel(done)
    for worker_id, stopped in (("alive", False), ("ended", True), ("silent", False)):
        with world.sessions.begin() as session:
            repository.record_presence(session, worker_id, "1", stopped=stopped)
    with world.engine.begin() as connection:
        connection.execute(
            text("UPDATE worker_processes SET seen_at = now() - interval '1 hour' WHERE worker_id = 'silent'")
        )
    with collecting(of_world) as registry:
        found = read(registry)
        assert value(found, "database_up") == value(found, "broker_up") == 1
        assert [value(found, "jobs", status=s) for s in ("queued", "running", "cancelling")] == [1, 1, 0]
        assert value(found, "units", stage="embed", state="running") == 1
        assert value(found, "units", stage="embed", state="pending") == 1
        assert value(found, "units", stage="prepare", state="pending") == 1
        assert value(found, "units", stage="prepare", state="succeeded") is None, "of a job that has ended"
        assert value(found, "workers_alive") == 1
        assert value(found, "leases_expired") == 0
        assert value(found, "artifacts_free_bytes") > 0

        world.lose_lease(claim)
        assert value(read(registry), "leases_expired") == 1
        world.expire()
        assert value(read(registry), "leases_expired") == 0
        world.cancel(cancelling)
        world.claim()
        world.cancel(running)
        assert value(read(registry), "jobs", status="cancelling") == 1


def test_what_is_claimable_is_what_a_claim_would_take(world: LedgerWorld, of_world: ApiSettings) -> None:
    def agrees(registry: CollectorRegistry, count: int) -> float | None:
        found = read(registry)
        with world.sessions() as session:
            assert value(found, "units_claimable") == ledger.claimable_count(session) == count
        return value(found, "oldest_claimable_unit_seconds")

    with collecting(of_world) as registry:
        assert agrees(registry, 0) == 0
        first = world.job(unit(Stage.EMBED, 0, key="shared"), unit(Stage.EMBED, 1))
        world.job(unit(Stage.EMBED, key="shared"))
        with world.engine.begin() as connection:
            connection.execute(text("UPDATE job_units SET created_at = now() - interval '1 hour'"))
        assert 3600 <= agrees(registry, 3) < 3700
        claim = world.claim()
        assert claim.artifact_key == "shared"
        agrees(registry, 1)  # the other of that artifact waits for it
        world.fail(claim, retryable=True, retries=ledger.Retries(max_attempts=3, seconds=600))
        agrees(registry, 2)  # this one is not due
        world.fail(world.claim(), retryable=True)
        world.release(world.claim())
        world.claim()
        world.cancel(first)
        agrees(registry, 1 if world.status(first) == "cancelling" else 0)


def test_scrapes_that_follow_closely_ask_once(world: LedgerWorld, of_world: ApiSettings) -> None:
    with collecting(of_world, cache_seconds=600) as registry:
        assert value(read(registry), "jobs", status="queued") == 0
        world.job()
        assert value(read(registry), "jobs", status="queued") == 0


def test_a_scrape_answers_though_database_and_broker_do_not(api: Api, of_world: ApiSettings) -> None:
    away = of_world.model_copy(
        update={
            "database": DatabaseSettings(url=f"postgresql://nobody@{NOWHERE}/none"),
            "broker": BrokerSettings(url=f"redis://{NOWHERE}/0"),
        }
    )
    with collecting(away) as registry:
        found = read(registry)
    assert value(found, "database_up") == value(found, "broker_up") == 0
    assert not any(name in ("winnow_jobs", "winnow_workers_alive") for name, _ in found)


def test_a_database_that_hangs_holds_up_no_scrape_and_is_told(world: LedgerWorld, of_world: ApiSettings) -> None:
    with collecting(of_world) as registry:
        with world.engine.begin() as connection:
            connection.execute(text("LOCK TABLE selection_jobs"))
            assert value(read(registry), "database_up") == 0
        wait_until(lambda: value(read(registry), "database_up") == 1, SOON, "the database answers again")


def test_messages_that_nobody_takes_are_counted(world: LedgerWorld, of_world: ApiSettings, broker_url: str) -> None:
    with redis.Redis.from_url(broker_url) as client, collecting(of_world) as registry:
        client.delete(QUEUE)
        client.rpush(QUEUE, "a", "b")
        assert value(read(registry), "broker_messages") == 2
        client.delete(QUEUE)


# The dispatcher


def test_the_dispatcher_counts_what_it_does(world: LedgerWorld, of_world: ApiSettings) -> None:
    registry = CollectorRegistry()
    dispatcher = Dispatcher(of_world, DispatchMetrics(registry))

    def count(name: str) -> float:
        return value(read(registry), name) or 0

    world.job()
    world.lose_lease(world.claim())
    cancelled = world.job(unit(Stage.EMBED))
    dispatcher.start()
    try:
        wait_until(lambda: count("leases_taken_back_total") == 1, SOON, "the lease is taken back")
        assert count("dispatch_leading") == 1
        wait_until(lambda: count("messages_sent_total") >= 1, SOON, "a worker is woken")
        while world.status(cancelled) == "queued":
            world.claim()
        world.cancel(cancelled)
        wait_until(lambda: count("cancels_forced_total") == 1, SOON, "the cancel is forced")
        assert count("dispatch_passes_failed_total") == 0
        with world.engine.begin() as connection:
            connection.execute(text("ALTER TABLE job_units RENAME TO job_units_away"))
            connection.execute(text(f"NOTIFY {CHANNEL}"))
        wait_until(lambda: count("dispatch_passes_failed_total") >= 1, SOON, "a pass fails")
    finally:
        with world.engine.begin() as connection:
            connection.execute(text("ALTER TABLE IF EXISTS job_units_away RENAME TO job_units"))
        dispatcher.stop()
    assert count("dispatch_leading") == 0


# The worker


def counted(supervisor: Supervisor) -> Samples:
    return read(supervisor._metrics.registry)


@contextmanager
def supervising(settings: ApiSettings) -> Iterator[Supervisor]:
    supervisor = Supervisor(settings)
    try:
        yield supervisor
    finally:
        supervisor.close()


def test_units_are_counted_by_how_they_ended(world: LedgerWorld, of_world: ApiSettings) -> None:
    store = ArtifactStore(of_world.artifacts.url)
    world.job(unit(Stage.EMBED, 0, key="made"), unit(Stage.EMBED, 1, key="also"))
    world.job(unit(Stage.PUBLISH, key="nothing"))
    for key in ("made", "also"):
        store.write_json(f"{key}.json", {})
    with supervising(of_world) as supervisor:
        supervisor.drain()
        found = counted(supervisor)
    ended = {key[1]: count for key, count in found.items() if key[0] == "winnow_worker_units_total"}
    outcomes = {tuple(sorted(labels)): count for labels, count in ended.items()}
    assert value(found, "worker_units_total", stage="embed", outcome="reused", code="") == 1, outcomes
    # The last of a wave plans the next, of which this job of no model has none; `publish` finds no selection.
    assert value(found, "worker_units_total", stage="embed", outcome="failed", code="internal_error") == 1, outcomes
    assert value(found, "worker_units_total", stage="publish", outcome="failed", code="internal_error") == 1, outcomes
    assert value(found, "worker_units_running", stage="embed") == 0


def test_a_child_that_dies_is_counted_by_its_cause(world: LedgerWorld, of_world: ApiSettings) -> None:
    world.job(unit(Stage.PREPARE, total=1))
    with supervising(of_world) as supervisor:
        thread = threading.Thread(target=supervisor.drain)
        thread.start()
        wait_until(lambda: supervisor._child is not None, SOON, "a child")
        assert value(counted(supervisor), "worker_units_running", stage="prepare") == 1
        supervisor._child._process.kill()
        thread.join(SOON)
        found = counted(supervisor)
    assert value(found, "worker_child_starts_total") == 1
    assert value(found, "worker_child_deaths_total", cause="SIGKILL") == 1
    assert value(found, "worker_units_total", stage="prepare", outcome="failed", code="compute_died") == 1


def test_a_lost_lease_a_missed_beat_and_samples_are_counted(
    world: LedgerWorld, of_world: ApiSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child is one that only talks: what is counted is the supervisor's."""

    class Talking:
        death, is_alive = None, True

        def __init__(self, _: Any) -> None:
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
    monkeypatch.setattr("worker.supervisor.Child", Talking)
    settings = of_world.model_copy(update={"ledger": LedgerSettings(beat_seconds=0.01)})
    world.job(unit(Stage.PREPARE, total=10))
    with supervising(settings) as supervisor:
        claims.append(world.claim())
        supervisor._do(claims[0])
        found = counted(supervisor)
    assert value(found, "worker_samples_total", stage="prepare") == 7
    assert value(found, "worker_units_total", stage="prepare", outcome="lease_lost", code="") == 1


def test_the_worker_answers_on_its_port_and_two_cannot_share_one(of_world: ApiSettings, unused_port: int) -> None:
    settings = of_world.model_copy(update={"worker": WorkerSettings(metrics_port=unused_port)})
    with supervising(settings) as supervisor:
        supervisor.start()
        with urllib.request.urlopen(f"http://127.0.0.1:{unused_port}/metrics", timeout=SOON) as answer:
            assert value(samples(answer.read().decode()), "worker_child_starts_total") == 0
        with pytest.raises(PortTaken, match=r"WINNOW_WORKER__METRICS_PORT: port \d+ cannot be had"):
            WorkerMetrics().serve(unused_port)


def test_a_worker_whose_port_is_taken_ends_and_says_which_setting_it_is(of_world: ApiSettings, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        worker = Worker(of_world, tmp_path / "worker.log", metrics_port=str(other.getsockname()[1]))
        try:
            assert worker._process.wait(SOON) == os.EX_CONFIG
        finally:
            worker.close()
    assert "WINNOW_WORKER__METRICS_PORT: port" in worker.log.read_text()


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Dashboard and alerts


def exported(settings: ApiSettings) -> dict[str, set[str]]:
    """The labels of every series that the API or a worker can export, by its name."""
    api = ApiMetrics(settings)
    found: dict[str, set[str]] = {}
    for registry in (api.registry, WorkerMetrics().registry):
        for collector in registry._collector_to_names:
            found |= _series(collector)
    api.close()
    return found


def _series(collector: Collector) -> dict[str, set[str]]:
    labels = set(getattr(collector, "_labelnames", ()))
    series: dict[str, set[str]] = {}
    for family in collector.collect():
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        own = labels | {name for sample in family.samples for name in sample.labels}
        series |= {family.name + ending: own | ({"le"} if ending == "_bucket" else set()) for ending in endings}
    return series


def dashboard() -> Any:
    return json.loads((OPS / "grafana" / "winnow.json").read_text())


def alerts() -> list[Any]:
    return [rule for group in yaml.safe_load((OPS / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def panels() -> list[Any]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]] + [rule["expr"] for rule in alerts()]


def test_dashboard_and_alerts_ask_for_nothing_that_is_not_exported(world: LedgerWorld, of_world: ApiSettings) -> None:
    world.job()
    series = exported(of_world)
    assert {"winnow_units", "winnow_http_request_seconds_bucket", "winnow_worker_units_total"} <= series.keys()
    asked = set()
    for expression in expressions():
        for name, matchers in re.findall(r"\b((?:winnow|process|python)_\w+)(\{[^}]*\})?", expression):
            assert name in series, f"{name} is not exported: {expression}"
            asked.add(name)
            matched = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            assert matched <= series[name] | {"job", "instance"}, f"{matched} of {name}: {expression}"
        grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(",")}
        known = set().union(*(series[name] for name in series if name in expression)) | {"job", "instance"}
        assert grouped <= known, f"{grouped}: {expression}"
    ours = {name for name in series if name.startswith("winnow_") and not name.endswith(("_count", "_sum"))}
    assert ours - asked == set(), "exported, and shown nowhere"


def test_the_dashboard_can_be_imported() -> None:
    found = dashboard()
    assert [row["title"] for row in found["panels"] if row["type"] == "row"] == [
        "Service health",
        "API",
        "Jobs and queue",
        "Workers",
    ]
    assert [variable["type"] for variable in found["templating"]["list"]] == ["datasource"]
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["targets"]
        assert panel["description"]
    taken = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in found["panels"]]
    assert len(taken) == len(set(taken)), "panels lie upon each other"


def test_every_alert_says_what_to_do() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names)) >= 8
    for rule in alerts():
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"]["summary"]
        assert re.search(r"[.!]$", rule["annotations"]["action"]), rule["alert"]
        assert rule["for"]


def test_prometheus_reads_api_workers_and_alerts() -> None:
    found = yaml.safe_load((OPS / "prometheus.yml").read_text())
    assert all((OPS / name).is_file() for name in found["rule_files"])
    jobs = {job["job_name"]: job["dns_sd_configs"][0] for job in found["scrape_configs"]}
    assert jobs.keys() == {"winnow-api", "winnow-worker"}
    services = yaml.safe_load((OPS.parent / "docker-compose.yml").read_text())["services"]
    assert {name for job in jobs.values() for name in job["names"]} <= services.keys()
    for name in jobs["winnow-worker"]["names"]:
        assert services[name]["environment"]["WINNOW_WORKER__METRICS_PORT"] == str(jobs["winnow-worker"]["port"])
