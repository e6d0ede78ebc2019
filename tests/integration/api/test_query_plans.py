"""No hot query reads a table from end to end, or more rows of an index than it needs; no list runs a query for each entry.

Every statement that a route or a step of the background runs is caught and explained (EXPLAIN ANALYZE), on tables of some size.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event, text
from sqlalchemy.orm import Session
from support.servers import new_database
from support.world import SECRET, make_settings, register_model
from support.world import World as Service

from service import ledger, tasks
from service.auth.principal import Scope
from service.background.dispatcher import MAX_MESSAGES
from service.datasets.uploads import repository as uploads
from service.idempotency import repository as idempotency
from service.jobs import repository as jobs
from service.keys.service import create_key
from service.plan.parameters import JobParameters
from service.retention import repository as collection
from service.settings import ApiSettings
from service.webhooks import repository as webhooks

JOBS, OPEN, MODEL = 30_000, 200, "small"
CROWD = 6_000  # open jobs, of which what looks for a few must not read all
MOST_ROWS = 1_500  # that one statement reads; a scan of the smallest big table reads more
SMALL = frozenset({"tenants", "webhook_endpoints", "workers"})

# As it is in the end; no triggers and foreign keys in this session. Tenant 1 has four of five jobs, tenant 3 a few old ones.
FILL = """
SET session_replication_role = replica;
CREATE TEMP TABLE filled AS
SELECT n, 'job_' || lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || substr(md5(n::text), 1, 20) AS id, at,
    CASE WHEN n > {jobs} - {open} THEN 'running' WHEN n % 400 = 0 THEN 'failed' ELSE 'succeeded' END::job_status AS status,
    CASE WHEN n > {jobs} - {open} THEN 1 + n % 2 WHEN n <= 60 THEN 3 WHEN n % 100 < 80 THEN 1 ELSE 2 END AS tenant
FROM (SELECT n, now() - interval '60 days' * (1 - n::float8 / {jobs}) AS at FROM generate_series(1, {jobs}) n) s;
CREATE TEMP TABLE owner AS
    SELECT substr(t.name, 8)::int AS tenant, t.id, k.id AS key_id, 
        coalesce((SELECT d.id FROM datasets d WHERE d.tenant_id = t.id), 'ds_' || md5(t.id || 1)) AS pool FROM tenants t
    JOIN api_keys k ON k.tenant_id = t.id;
INSERT INTO datasets (id, tenant_id, key_id, name, fingerprint, row_count, byte_count, sources)
    SELECT 'ds_' || md5(o.id || i), o.id, CASE WHEN i < 500 THEN o.key_id END, 'pool', encode(sha256((o.id || i)::bytea), 'hex'),
        9, 9, '{{}}' FROM owner o, generate_series(1, CASE tenant WHEN 3 THEN 20 ELSE 3000 END) i;
INSERT INTO api_keys (id, tenant_id, name, prefix, digest)
    SELECT 'key_' || md5(o.id || i), 'tnt_' || i, 'k', md5(o.id || i), sha256('') FROM owner o, generate_series(1, 2000) i;
INSERT INTO key_usage (key_id, samples) SELECT id, 1000000 FROM api_keys ON CONFLICT (key_id) DO UPDATE SET samples = 1000000;
INSERT INTO key_samples (key_id, second, samples_before)
    SELECT o.key_id, date_trunc('second', now()) - i * interval '3 seconds', 999999 - i FROM owner o, generate_series(1, 40000) i;
INSERT INTO uploads (id, tenant_id, key_id, sha256, bytes, part_bytes)
    SELECT 'up_' || md5(k.id), k.tenant_id, k.id, encode(sha256(k.id::bytea), 'hex'), 9, 9 FROM api_keys k;
INSERT INTO selection_jobs (id, tenant_id, key_id, status, pool_id, target_id, model, budget, parameters, request, job_metadata,
        error, started_at, finished_at, deleted_at, created_at)
    SELECT f.id, o.id, o.key_id, f.status, o.pool, o.pool, '{{"kind": "registered", "name": "other"}}', 9,
        $parameters$, '{{}}', '{{}}',
        CASE f.status WHEN 'failed' THEN '{{"code": "c", "detail": "d"}}'::jsonb END, f.at,
        CASE f.status WHEN 'running' THEN NULL ELSE f.at END, NULL, f.at
    FROM filled f JOIN owner o USING (tenant);
UPDATE selection_jobs j SET name = called.name, folded_name = called.name, labels = jsonb_build_object('team', called.team),
    terms = ARRAY(SELECT DISTINCT right(j.tenant_id, 8) || term FROM (
        SELECT substr(called.name, i, length) FROM generate_series(1, length(called.name)) i, generate_series(1, 2) length
        UNION SELECT 'team:' || called.team
    ) AS terms (term))
    FROM (SELECT id, 'run of ' || CASE WHEN n % 1000 = 1 THEN 'gsm8k' ELSE md5(n::text) END AS name,
        CASE WHEN n % 1000 = 1 THEN 'rare' ELSE 'usual' END AS team FROM filled) called
    WHERE j.id = called.id;
INSERT INTO job_units (job_id, stage, shard, artifact_key, spec, state, attempt, progress_done, progress_total, worker_id,
        lease_expires_at, started_at, finished_at, result, created_at)
    SELECT f.id, u.stage::stage, 0, u.stage || f.id, '{{}}', u.state::unit_state, 1, 0, 9, 'w',
        CASE u.state WHEN 'running' THEN now() + interval '1 day' END, f.at, CASE u.state WHEN 'succeeded' THEN f.at END,
        CASE u.state WHEN 'succeeded' THEN '{{}}'::jsonb END, f.at
    FROM filled f,
        LATERAL (VALUES ('prepare', CASE WHEN f.status = 'running' AND f.n % 2 = 0 THEN 'running' ELSE 'succeeded' END),
        ('embed', CASE f.status WHEN 'running' THEN 'pending' ELSE 'succeeded' END)) u (stage, state);
INSERT INTO job_events (job_id, type, data) SELECT id, 'job.queued', '{{}}' FROM filled, generate_series(1, 2);
INSERT INTO job_results (job_id, sample_count, summary)
    SELECT id, 9, '{{"selected_count": 9}}' FROM filled WHERE status = 'succeeded';
INSERT INTO provenance (job_id, weights_root, record) SELECT id, sha256(''), '{{}}' FROM filled WHERE status = 'succeeded';
INSERT INTO weight_chunks (job_id, chunk_no, influence, weight, exact, sha256) SELECT id, 0, array_fill(1.0::real, ARRAY[9]),
    array_fill(1.0::real, ARRAY[9]), array_fill(true, ARRAY[9]), sha256('') FROM filled WHERE status = 'succeeded' AND n % 5 = 1;
INSERT INTO selected_samples (job_id, rank, sample_index, sample_id, influence, weight, exact)
    SELECT id, i, i, 's', 1, 1, true FROM filled, generate_series(0, 8) i WHERE status = 'succeeded' AND n % 5 = 1;
INSERT INTO audit_log (tenant_id, key_id, actor, action, object_id, detail)
    SELECT o.id, o.key_id, 'api', 'selection_job.created', f.id, '{{}}' FROM filled f JOIN owner o USING (tenant);
INSERT INTO idempotency_keys (tenant_id, key, request_sha256, status, headers, sealed_body)
    SELECT o.id, f.id, '', 202, '{{}}', '' FROM filled f JOIN owner o USING (tenant);
INSERT INTO webhook_endpoints (id, tenant_id, url, description, events, sealed_secret)
    SELECT 'whk_' || md5(o.id || i), o.id, 'https://example.com', '', '{{}}', '' FROM owner o, generate_series(1, 5) i;
INSERT INTO webhook_deliveries (id, endpoint_id, job_id, type, payload, state, next_attempt_at, finished_at)
    SELECT 'msg_' || lpad(to_hex(f.n), 12, '0') || substr(f.id, 17), 'whk_' || md5(o.id || 1), f.id, 't', '{{}}',
        CASE WHEN f.n % 1000 = 0 THEN 'pending' ELSE 'delivered' END, CASE WHEN f.n % 1000 = 0 THEN now() END,
        CASE WHEN f.n % 1000 <> 0 THEN f.at END
    FROM filled f JOIN owner o USING (tenant);
INSERT INTO webhook_attempts (delivery_id, status, seconds) SELECT id, 200, 1 FROM webhook_deliveries;
INSERT INTO tasks (id, kind, subject, tenant_id, key_id, input, state, lease_expires_at, started_at, finished_at,
        created_at, kept_seconds)
    SELECT 'task_' || substr(f.id, 5), 'import_dataset', f.id, o.id, o.key_id, '{{}}', s.state::task_state,
        CASE s.state WHEN 'running' THEN now() END, CASE s.state WHEN 'pending' THEN NULL ELSE f.at END,
        CASE s.state WHEN 'succeeded' THEN f.at END, f.at, CASE WHEN f.n % 100 = 0 THEN 600 END
    FROM filled f JOIN owner o USING (tenant),
        LATERAL (SELECT CASE WHEN f.n % 500 = 0 THEN 'pending' WHEN f.n % 500 = 1 THEN 'running' ELSE 'succeeded' END) s (state);
INSERT INTO workers (worker_id, version, started_at, seen_at) VALUES ('w', 'v', now(), now());
"""


@dataclass
class Caught:
    """Statements with their parameters, while `catching`."""

    engine: Engine
    found: list[tuple[str, Any]] = field(default_factory=list)

    def note(self, _connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        self.found.append((statement, parameters[0] if many else parameters))

    @contextmanager
    def catching(self) -> Iterator[list[tuple[str, Any]]]:
        self.found = []
        event.listen(self.engine, "before_cursor_execute", self.note)
        try:
            yield self.found
        finally:
            event.remove(self.engine, "before_cursor_execute", self.note)


@dataclass(frozen=True)
class World:
    url: str
    app: FastAPI
    clients: list[TestClient]
    caught: Caught
    ids: dict[str, str]

    def plans(self, found: list[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(statement, plan) of what reads or changes rows that are there; nothing stays changed."""
        with psycopg.connect(self.url) as connection:
            for statement, parameters in found:
                if not statement.lstrip().upper().startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
                    continue
                explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"
                (told,) = connection.execute(explain.encode(), parameters).fetchone()  # type: ignore[misc]
                connection.rollback()
                yield statement, told[0]["Plan"]


@pytest.fixture(scope="module")
def world(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with _made(postgres_url, tmp_path_factory.mktemp("plans"), OPEN, concurrent_jobs=10_000) as world:
        yield world


@pytest.fixture(scope="module")
def crowded(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with _made(postgres_url, tmp_path_factory.mktemp("crowded"), CROWD, concurrent_jobs=0) as world:
        yield world


@contextmanager
def _made(postgres_url: str, folder: Path, open_jobs: int, **limits: int) -> Iterator[World]:
    with (
        new_database(postgres_url) as url,
        Service.made(
            make_settings(url, folder, limits=limits),
            scopes=Scope,
            tenants=("tenant 1", "tenant 2"),
        ) as service,
    ):
        app = service.app
        register_model(service.settings, MODEL)
        with service.sessions.begin() as session:
            key = create_key(session, tenant_name="tenant 3", key_name="k", secret_key=SECRET, scopes=Scope)
        third = TestClient(app, headers={"Authorization": f"Bearer {key}"})
        clients = [service.client, service.other, third]
        rows = "".join(f'{{"prompt": "a {i}", "completion": "b"}}\n' for i in range(9))
        assert clients[0].post("/v1/datasets", params={"name": "pool"}, content=rows).status_code == 201
        ids = _fill(url, open_jobs)
        for client in clients:
            assert (
                client.get("/v1/usage").status_code == 200
            )  # writes that the key was used, which is not told of below
        yield World(url, app, clients, Caught(app.state.engine), ids)


def _fill(url: str, open_jobs: int) -> dict[str, str]:
    parameters = json.dumps(JobParameters().model_dump(mode="json")).replace("'", "''")
    script = FILL.format(jobs=JOBS, open=open_jobs).replace("$parameters$", f"'{parameters}'")
    one = "SELECT id FROM filled WHERE tenant = 1 AND "
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(script.encode())
        connection.execute("VACUUM ANALYZE")  # as autovacuum does
        named = {
            "running": f"{one} status = 'running' LIMIT 1",
            "succeeded": f"{one} status = 'succeeded' AND n % 5 = 1 ORDER BY n DESC LIMIT 1",
            "middle": f"{one} n = {JOBS // 2 + 1}",
            "pool": "SELECT pool FROM owner WHERE tenant = 1",
            "webhook": "SELECT 'whk_' || md5(id || 1) FROM owner WHERE tenant = 1",
            "webhook_of_3": "SELECT 'whk_' || md5(id || 1) FROM owner WHERE tenant = 3",
            "delivery": "SELECT max(d.id) FROM webhook_deliveries d JOIN owner o ON endpoint_id = 'whk_' || md5(o.id || 1)"
            " WHERE o.tenant = 1",
        }
        return {name: connection.execute(query.encode()).fetchone()[0] for name, query in named.items()}  # type: ignore[index]


def _scans(plan: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(table, kind, rows that were read) of each node that reads a table or an index."""
    removed = sum(plan.get(f"Rows Removed by {why}", 0) for why in ("Filter", "Index Recheck"))
    if "Scan" in plan["Node Type"] and (table := plan.get("Relation Name")):
        yield table, plan["Node Type"], (plan["Actual Rows"] + removed) * plan["Actual Loops"]
    if plan["Node Type"] == "Bitmap Index Scan":
        yield plan["Index Name"], plan["Node Type"], plan["Actual Rows"] * plan["Actual Loops"]
    for below in plan.get("Plans", ()):
        yield from _scans(below)


def check(world: World, work: Callable[[], Any], at_least: int = 1) -> None:
    with world.caught.catching() as found:
        work()
    explained = 0
    for statement, plan in world.plans(list(found)):
        explained += 1
        for table, kind, rows in _scans(plan):
            assert kind != "Seq Scan" or table in SMALL, f"reads all of {table}:\n{statement}"
            assert rows <= MOST_ROWS, f"{kind} of {table} reads {rows:,.0f} rows:\n{statement}"
    assert explained >= at_least


def _get(world: World, path: str, tenant: int = 1) -> Callable[[], None]:
    def get() -> None:
        answer = world.clients[tenant - 1].get(f"/v1/{path.format(**world.ids)}")
        assert answer.status_code == 200, answer.text

    return get


READS = [
    ("selection-jobs/{running}", 1),
    ("selection-jobs/{succeeded}", 1),
    ("selection-jobs?limit=100", 1),
    ("selection-jobs?limit=100&after={middle}", 1),
    ("selection-jobs?status=running", 1),
    ("selection-jobs?status=cancelling", 1),
    ("selection-jobs?status=failed&after={middle}", 1),
    ("selection-jobs?limit=100", 2),
    ("selection-jobs?status=cancelling", 2),
    ("selection-jobs?limit=100", 3),
    ("selection-jobs?label=team:rare", 1),
    ("selection-jobs?label=team:usual", 1),
    ("selection-jobs?label=team:rare&status=succeeded", 1),
    ("selection-jobs?label=team:none", 1),
    ("selection-jobs?name=gsm8k", 1),
    ("selection-jobs?name=GSM8K&label=team:rare&after={middle}", 1),
    ("selection-jobs?name=run of", 1),
    ("selection-jobs?name=~", 1),
    ("selection-jobs?label=team:rare", 3),
    ("selection-jobs/{running}/queue", 1),
    ("workers", 1),
    ("selection-jobs/{running}/events?limit=100", 1),
    ("selection-jobs/{succeeded}/results", 1),
    ("selection-jobs/{succeeded}/weights?limit=5", 1),
    ("selection-jobs/{succeeded}/selected?limit=5", 1),
    ("datasets?limit=100", 1),
    ("datasets?limit=100", 3),
    ("datasets/{pool}", 1),
    ("uploads?limit=100", 1),
    ("keys?limit=100", 1),
    ("usage", 1),
    ("audit-log?limit=100", 1),
    ("audit-log?limit=100&after=9000", 1),
    ("audit-log?object_id={succeeded}", 1),
    ("webhooks", 1),
    ("webhooks/{webhook}/deliveries?limit=100", 1),
    ("webhooks/{webhook_of_3}/deliveries?limit=100", 3),
    ("webhooks/{webhook}/deliveries?state=failed", 1),
    ("webhooks/{webhook}/deliveries/{delivery}", 1),
]


@pytest.mark.parametrize(("path", "tenant"), READS, ids=[f"{path} of tenant {tenant}" for path, tenant in READS])
def test_a_read_looks_at_few_rows(world: World, path: str, tenant: int) -> None:
    check(world, _get(world, path, tenant), at_least=2)


def _post_twice(world: World) -> Callable[[], None]:
    request = {"model": MODEL, "pool": world.ids["pool"], "target": world.ids["pool"], "budget": 1}

    def post() -> None:
        for _ in range(2):
            answer = world.clients[0].post("/v1/selection-jobs", json=request, headers={"Idempotency-Key": "k"})
            assert answer.status_code == 202, answer.text

    return post


def test_a_submission_and_its_repetition_look_at_few_rows(world: World) -> None:
    check(world, _post_twice(world), at_least=6)


def test_a_submission_looks_at_few_rows_however_many_jobs_are_open(crowded: World) -> None:
    check(crowded, _post_twice(crowded), at_least=6)


def _counted_key(session: Session) -> str:
    named = text("SELECT k.id FROM tenants t JOIN api_keys k ON k.tenant_id = t.id WHERE t.name = 'tenant 1'")
    return session.execute(named).scalar_one()


BACKGROUND: dict[str, Callable[[Session], Any]] = {
    "claim": lambda s: ledger.claim_unit(s, worker_id="w", lease_seconds=60),
    "claimable": lambda s: ledger.claimable_count(s, most=MAX_MESSAGES),
    "leases": lambda s: ledger.expire_leases(s, retries=ledger.Retries(max_attempts=3, seconds=0)),
    "cancels": lambda s: ledger.expire_cancels(s, after_seconds=1),
    "claimed task": lambda s: tasks.claim_task(s, worker_id="w", lease_seconds=60, kinds=["import_dataset"]),
    "claimable tasks": lambda s: tasks.claimable_count(s, most=64),
    "leases of tasks": lambda s: tasks.expire_leases(s, retries=ledger.Retries(max_attempts=3, seconds=0)),
    "expired tasks": lambda s: tasks.delete_expired(s),
    "gauges": lambda s: jobs.gauges(s, alive_seconds=60, timeout_seconds=60),
    "diagnosis": lambda s: jobs.diagnosis(s, ApiSettings.model_fields["ledger"].default),
    "unwanted deliveries": lambda s: webhooks.fail_unwanted(s),
    "due deliveries": lambda s: webhooks.claim(s, [d.id for d in webhooks.due(s, each=2)], lease_seconds=60),
    "overdue deliveries": lambda s: webhooks.overdue(s, seconds=60),
    "expired uploads": lambda s: uploads.expired(s, hours=24, limit=100),
    "parts of uploads": lambda s: uploads.existing(s, ["up_" + "0" * 32]),
    "old answers": lambda s: idempotency.delete_old(s),
    "samples that leave a quota": lambda s: jobs.samples_leave_at(s, _counted_key(s), room=28_000),
    "artifacts in use": lambda s: collection.in_use(s),
}


@pytest.mark.parametrize("step", BACKGROUND)
def test_a_step_of_the_background_looks_at_few_rows(world: World, step: str) -> None:
    def work() -> None:
        with world.app.state.sessions() as session:
            BACKGROUND[step](session)
            session.rollback()

    check(world, work)


@pytest.mark.parametrize("step", ["claimable", "leases", "cancels"])
def test_a_pass_of_the_dispatcher_looks_at_few_rows_however_many_jobs_are_open(crowded: World, step: str) -> None:
    def work() -> None:
        with crowded.app.state.sessions() as session:
            BACKGROUND[step](session)
            session.rollback()

    check(crowded, work)


LISTS = [
    *(
        "selection-jobs?",
        "selection-jobs?status=succeeded&",
        "selection-jobs/{running}/events?",
        "datasets?",
        "keys?",
        "webhooks?",
    ),
    *("selection-jobs/{succeeded}/weights?", "selection-jobs/{succeeded}/selected?", "audit-log?"),
    "webhooks/{webhook}/deliveries?",
]


@pytest.mark.parametrize("path", LISTS)
def test_a_list_of_a_hundred_runs_no_more_queries_than_one_of_one(world: World, path: str) -> None:
    counts = []
    _get(world, f"{path}limit=1")()  # which may write that the key was used
    for limit in (1, 100):
        with world.caught.catching() as found:
            _get(world, f"{path}limit={limit}")()
        counts.append(len(found))
    assert counts[0] == counts[1] > 0


def test_what_is_checked_can_fail(world: World) -> None:
    def scan() -> None:
        with world.app.state.sessions() as session:
            session.execute(text("SELECT count(*) FROM job_events WHERE type = 'none'")).all()

    with pytest.raises(AssertionError, match="reads all of job_events"):
        check(world, scan)
