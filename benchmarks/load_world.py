"""The environment of `api.py`: a real PostgreSQL and broker, 100,000 jobs, and an API process in front of them."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
from measuring import serve_api
from sqlalchemy import make_url

# Those that are not used here are by `_MAKE`.
from service.auth.principal import Scope  # noqa: F401
from service.db.engine import make_engine, make_sessions  # noqa: F401
from service.db.migrate import upgrade  # noqa: F401
from service.keys.service import create_key  # noqa: F401
from service.local.process_group import ProcessGroup
from service.local.servers import start_postgres, start_valkey
from service.plan.parameters import JobParameters
from service.settings import DatabaseSettings  # noqa: F401

SECRET = "benchmark-only-0123456789abcdef0123456789"
MODEL = "tiny"
_CONNECTIONS = 200
_COUNTERS = import_module("migrations.versions.0008_submissions").FILL
DAYS = 60
SHARES = (0.9, 0.05, 0.05)  # of the three tenants

# Inserts the rows in their final state, without the transitions: triggers and foreign keys are off in this session.
_FILL = """
SET session_replication_role = replica;
CREATE TEMP TABLE filled AS
SELECT n, 'job_' || lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || substr(md5(n::text), 1, 20) AS id, at,
    CASE WHEN n > {jobs} - {running} THEN 'running' WHEN n % 200 = 0 THEN 'cancelled' WHEN n % 40 = 0 THEN 'failed'
        ELSE 'succeeded' END::job_status AS status,
    CASE WHEN n > {jobs} - {running} THEN 1 + n % 3 WHEN n % 100 < 90 THEN 1 ELSE 2 + n % 2 END AS tenant
FROM (SELECT n, now() - interval '{days} days' * (1 - n::float8 / {jobs}) AS at FROM generate_series(1, {jobs}) n) s;
INSERT INTO datasets (id, tenant_id, name, fingerprint, row_count, byte_count, sources, created_at)
    SELECT 'ds_' || md5(t.id), t.id, 'pool', encode(sha256(t.id::bytea), 'hex'), 1000, 100000, '{{}}', now() FROM tenants t;
INSERT INTO selection_jobs (id, tenant_id, key_id, status, pool_id, target_id, model, budget, parameters, request,
        job_metadata, error, started_at, finished_at, created_at)
    SELECT f.id, t.id, k.id, f.status, 'ds_' || md5(t.id), 'ds_' || md5(t.id), '{{"kind": "registered", "name": "other"}}', 50,
        %(parameters)s::jsonb, '{{}}', '{{}}',
        CASE f.status WHEN 'failed' THEN '{{"code": "out_of_memory", "detail": "-"}}'::jsonb END,
        f.at, CASE f.status WHEN 'running' THEN NULL ELSE f.at + interval '1 hour' END, f.at
    FROM filled f JOIN tenants t ON t.name = 'tenant ' || f.tenant JOIN api_keys k ON k.tenant_id = t.id;
INSERT INTO job_units (job_id, stage, shard, artifact_key, spec, state, attempt, progress_done, progress_total, worker_id,
        lease_expires_at, started_at, finished_at, result, created_at)
    SELECT f.id, u.stage::stage, u.shard, u.stage || '/' || f.id || u.shard, '{{}}', u.state::unit_state, 1,
        CASE u.state WHEN 'succeeded' THEN 500 ELSE 200 END, 500, 'worker',
        CASE u.state WHEN 'running' THEN now() + interval '1 day' END,
        f.at, CASE u.state WHEN 'succeeded' THEN f.at + interval '5 minutes' END,
        CASE u.state WHEN 'succeeded' THEN '{{"reused": false, "operations": 1e12, "seconds": 10}}'::jsonb END, f.at
    FROM filled f, LATERAL (VALUES ('prepare', 0, 'succeeded'), ('landmark_gradients', 0, 'succeeded'),
        ('embed', 0, CASE f.status WHEN 'running' THEN 'running' ELSE 'succeeded' END)) u (stage, shard, state);
INSERT INTO job_events (job_id, type, data, created_at)
    SELECT f.id, e.type, '{{"stage": "embed", "shard": 0}}', f.at FROM filled f,
        LATERAL (VALUES ('job.queued'), ('job.running'), ('unit.claimed'), ('unit.succeeded')) e (type);
"""

_END = """
WITH ended AS (UPDATE selection_jobs SET status = 'succeeded', finished_at = clock_timestamp() WHERE id = %s RETURNING id)
INSERT INTO job_events (job_id, type, data) SELECT id, 'job.succeeded', '{}' FROM ended
"""


@dataclass(frozen=True)
class World:
    """`running`: (key, job) of the running jobs; `cursors`: ids of the big tenant's jobs, spread over all of them."""

    folder: Path
    database_url: str
    broker_url: str
    keys: list[str]
    running: list[tuple[str, str]]
    cursors: list[str]

    @property
    def libpq(self) -> str:
        return self.database_url.replace("+psycopg", "")


# Run within a checkout, whose schema and defaults may be others: names of its own load_world.
_MAKE = """
import json, sys
from pathlib import Path
import load_world as its

folder, url, broker, jobs, running = sys.argv[1:]
its.upgrade(url)
engine = its.make_engine(its.DatabaseSettings(url=url))
with its.make_sessions(engine).begin() as session:
    keys = [
        its.create_key(session, tenant_name=f"tenant {i}", key_name="load", secret_key=its.SECRET, scopes=tuple(its.Scope))
        for i in (1, 2, 3)
    ]
engine.dispose()
world = its._fill(Path(folder), url, broker, keys, int(jobs), int(running))
print(json.dumps([world.keys, world.running, world.cursors]))
"""


@contextmanager
def make_worlds(
    folder: Path, jobs: int, running: int, group: ProcessGroup, codes: Mapping[str, Path]
) -> Iterator[dict[str, World]]:
    """For each checkout a database of its own, with that many jobs of three tenants, most of them of one tenant; everything is
    stopped at the end. Alike for all: no one's submissions are there for another."""
    for name in ("logs", "store", f"models/{MODEL}"):
        (folder / name).mkdir(parents=True)
    config = {"model_type": "llama", "num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512}
    (folder / "models" / MODEL / "config.json").write_text(json.dumps(config))
    try:
        url, broker = start_postgres(folder, group, _CONNECTIONS), start_valkey(folder, group)
        yield {name: _made(folder, url, broker, name, code, jobs, running) for name, code in codes.items()}
    finally:
        group.stop()


@contextmanager
def make_world(folder: Path, jobs: int, running: int, group: ProcessGroup) -> Iterator[World]:
    """One of this checkout."""
    with make_worlds(folder, jobs, running, group, {"now": Path(__file__).resolve().parent.parent}) as worlds:
        yield worlds["now"]


def _made(folder: Path, url: str, broker: str, name: str, code: Path, jobs: int, running: int) -> World:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    own = make_url(url).set(database=name).render_as_string(hide_password=False)
    environment = {**os.environ, "PYTHONPATH": f"{code}:{code / 'benchmarks'}"}
    command = [sys.executable, "-c", _MAKE, str(folder), own, broker, str(jobs), str(running)]
    made = subprocess.run(command, env=environment, cwd=code, stdout=subprocess.PIPE, text=True, check=True)
    keys, found, cursors = json.loads(made.stdout.splitlines()[-1])
    return World(folder, own, broker, keys, [(key, job) for key, job in found], cursors)


def _fill(folder: Path, url: str, broker: str, keys: list[str], jobs: int, running: int) -> World:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        parameters = json.dumps(JobParameters().model_dump(mode="json")).replace("'", "''")
        script = _FILL.format(jobs=jobs, running=running, days=DAYS).replace("%(parameters)s", f"'{parameters}'")
        # Counted at once, as the migration does: a hundred thousand changes of one row in one transaction take minutes.
        connection.execute("ALTER TABLE selection_jobs DISABLE TRIGGER selection_jobs_count")
        connection.execute(script)
        connection.execute("ALTER TABLE selection_jobs ENABLE TRIGGER selection_jobs_count")
        connection.execute(f"DELETE FROM key_samples; DELETE FROM key_usage; {_COUNTERS}".encode())
        connection.execute("VACUUM ANALYZE")
        found = connection.execute("SELECT tenant, id FROM filled WHERE status = 'running' ORDER BY n").fetchall()
        every = max(1, jobs // 500)
        cursors = connection.execute(
            "SELECT id FROM filled WHERE tenant = 1 AND n %% %s = 1 ORDER BY n", [every]
        ).fetchall()
    random.Random(0).shuffle(found)
    return World(folder, url, broker, keys, [(keys[t - 1], job) for t, job in found], [row[0] for row in cursors])


@contextmanager
def serving(world: World, code: Path, workers: int, *, minimal: bool = False) -> Iterator[tuple[str, psutil.Process]]:
    """The URL and the process of an API; with more than one worker, that of their supervisor."""
    settings = {
        "WINNOW_DATABASE__URL": world.database_url,
        "WINNOW_BROKER__URL": world.broker_url,
        "WINNOW_ARTIFACTS__URL": str(world.folder / "store"),
        "WINNOW_MODELS__FOLDER": str(world.folder / "models"),
        "WINNOW_SECRET_KEY": SECRET,
        "WINNOW_LIMITS__REQUESTS_PER_MINUTE": "0",
        "WINNOW_LIMITS__CONCURRENT_JOBS": "0",
    }
    with serve_api(code, settings, world.folder / "logs" / "api.log", workers, minimal=minimal) as (url, process):
        yield url, psutil.Process(process.pid)


def upload(url: str, key: str) -> dict[str, Any]:
    """The body of a submission, with a model, a pool and a target that exist."""
    found = {}
    for name, rows in (("pool", 1000), ("target", 20)):
        content = "".join(f'{{"prompt": "ask {name} {i}", "completion": "b"}}\n' for i in range(rows))
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/v1/datasets", params={"name": name}, content=content, headers=headers, timeout=60)
        found[name] = answer.raise_for_status().json()["id"]
    return {"model": MODEL, "budget": 50, **found}


@contextmanager
def ending(world: World, jobs: list[str], every_seconds: float) -> Iterator[None]:
    """Ends these jobs one by one while the block runs, as a worker does: the status and its event in one transaction."""
    done = threading.Event()

    def end() -> None:
        with psycopg.connect(world.libpq, autocommit=True) as connection:
            for job in jobs:
                if done.wait(every_seconds):
                    return
                connection.execute(_END, [job])

    thread = threading.Thread(target=end)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Watch:
    """Resource use of the API, PostgreSQL and the whole machine while a scenario runs."""

    def __init__(self, world: World, api: psutil.Process, postgres: psutil.Process) -> None:
        self._world, self._api, self._postgres = world, api, postgres
        self.peak_rss = self.connections = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._started, self._cpu = time.monotonic(), self._seconds()
        psutil.cpu_percent()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        seconds = time.monotonic() - self._started
        used = {name: now - self._cpu[name] for name, now in self._seconds().items()}
        self.found = {
            "api_cpu_seconds": round(used["api"], 1),
            "api_cores": round(used["api"] / seconds, 2),
            "postgres_cores": round(used["postgres"] / seconds, 2),
            "machine_busy": round(psutil.cpu_percent() / 100, 2),
            "api_peak_rss_mib": self.peak_rss >> 20,
            "connections": self.connections,
        }

    def _run(self) -> None:
        with psycopg.connect(self._world.libpq, autocommit=True) as connection:
            ours = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            while not self._stopping.wait(0.5):
                self.peak_rss = max(self.peak_rss, sum(p.memory_info().rss for p in _family(self._api)))
                self.connections = max(self.connections, connection.execute(ours).fetchone()[0])  # type: ignore[index]

    def _seconds(self) -> dict[str, float]:
        parts = {"api": self._api, "postgres": self._postgres}
        return {name: cpu_seconds(process) for name, process in parts.items()}


def cpu_seconds(process: psutil.Process) -> float:
    """Of a process and its children."""
    return sum(_cpu(p) for p in _family(process))


def _family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    # Includes child processes that have ended, since connections come and go.
    ended = times.children_user + times.children_system
    return float(times.user + times.system + ended)
