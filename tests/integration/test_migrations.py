"""The migrations against the models, and what PostgreSQL itself holds: transitions, immutability, the view, names."""

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from ledger_world import LedgerWorld, ledger_world, new_database, unit, wait_until
from sqlalchemy import Connection, Engine, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from typer.testing import CliRunner

from service.cli import app
from service.jobs.parameters import JobParameters
from service.jobs.state import JOB_TRANSITIONS, TERMINAL, UNIT_TRANSITIONS, JobStatus, Stage, UnitState
from service.schema import MigrationError, alembic_config, metadata, migrating, upgrade
from service.settings import DatabaseSettings

HEAD = "0004"
CATALOG = """
    SELECT 'relation ' || relname FROM pg_class WHERE relnamespace = 'public'::regnamespace
    UNION ALL SELECT 'type ' || typname FROM pg_type WHERE typnamespace = 'public'::regnamespace
    UNION ALL SELECT 'function ' || proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL SELECT 'trigger ' || tgname FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT 'constraint ' || conname || pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace
    UNION ALL SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname = 'public'
"""


@pytest.fixture(scope="module")
def world(postgres_url: str) -> Iterator[LedgerWorld]:
    with ledger_world(postgres_url) as world:
        yield world


def test_downgrade_leaves_nothing_behind_and_upgrade_makes_the_same_again(postgres_url: str) -> None:
    with new_database(postgres_url, migrated=False) as url:
        engine = create_engine(DatabaseSettings(url=url).url)

        def catalog() -> set[str]:
            with engine.connect() as connection:
                return set(connection.scalars(text(CATALOG)))

        upgrade(url)
        first = catalog()
        command.downgrade(alembic_config(url), "base")
        assert not {entry for entry in catalog() if "alembic_version" not in entry}
        upgrade(url)
        assert catalog() == first
        engine.dispose()


def test_the_models_and_the_migrated_database_are_the_same(world: LedgerWorld) -> None:
    with world.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True, "target_metadata": metadata}
        )
        assert compare_metadata(context, metadata) == []


def test_checks_and_partial_indexes_are_those_of_the_models(world: LedgerWorld, postgres_url: str) -> None:
    # Alembic compares neither; so the models' own CREATE TABLE is compared with what the migrations made.
    definitions = """
        SELECT conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
            WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version'
        UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'
    """
    with new_database(postgres_url, migrated=False) as url:
        engine = create_engine(DatabaseSettings(url=url).url)
        metadata.create_all(engine)
        with engine.connect() as connection, world.engine.connect() as migrated:
            of_models = set(connection.scalars(text(definitions)))
            assert set(migrated.scalars(text(definitions))) == of_models
        engine.dispose()


def test_every_constraint_has_a_name_by_the_convention(world: LedgerWorld) -> None:
    with world.engine.connect() as connection:
        rows = connection.execute(
            text("""
            SELECT conrelid::regclass::text AS on_table, contype::text AS kind, conname AS name FROM pg_constraint
            WHERE connamespace = 'public'::regnamespace AND contype IN ('c', 'f', 'p', 'u')
                AND conrelid::regclass::text <> 'alembic_version'
        """)
        ).all()
    prefixes = {"c": "ck_", "f": "fk_", "p": "pk_", "u": "uq_"}
    assert {row.kind for row in rows} == set(prefixes)
    assert [row.name for row in rows if not row.name.startswith(f"{prefixes[row.kind]}{row.on_table}")] == []


def _walk(steps: frozenset[tuple[Any, Any]], start: StrEnum, end: StrEnum) -> list[StrEnum]:
    """A shortest way from start to end along the transitions."""
    ways = [[start]]
    while ways[0][-1] != end:
        way = ways.pop(0)
        ways += [[*way, after] for before, after in sorted(steps) if before == way[-1] and after not in way]
    return ways[0][1:]


_SET_STATUS = text("""
    UPDATE selection_jobs SET status = CAST(:status AS job_status),
        finished_at = CASE WHEN :status IN ('succeeded', 'failed', 'cancelled') THEN now() END,
        error = CASE WHEN :status = 'failed' THEN '{}'::jsonb END
    WHERE id = :id
""")
_SET_STATE = text("""
    UPDATE job_units SET state = CAST(:status AS unit_state), worker_id = 'w', started_at = now(),
        lease_expires_at = CASE WHEN :status = 'running' THEN now() END
    WHERE job_id = :id
""")


@pytest.mark.parametrize(
    ("states", "first", "transitions", "change"),
    [
        pytest.param(JobStatus, JobStatus.QUEUED, JOB_TRANSITIONS, _SET_STATUS, id="jobs"),
        pytest.param(UnitState, UnitState.PENDING, UNIT_TRANSITIONS, _SET_STATE, id="units"),
    ],
)
def test_the_trigger_allows_exactly_the_transitions_of_the_table(
    world: LedgerWorld, states: type[StrEnum], first: StrEnum, transitions: frozenset[tuple[Any, Any]], change: Any
) -> None:
    allowed, refusals = set(), {}
    for before, after in itertools.permutations(states, 2):
        job_id = world.job()
        with world.engine.begin() as connection:
            for step in _walk(transitions, first, before):
                connection.execute(change, {"id": job_id, "status": step.value})
        try:
            with world.engine.begin() as connection:
                connection.execute(change, {"id": job_id, "status": after.value})
        except IntegrityError as error:
            refusals[before, after] = str(error.orig)
        else:
            allowed.add((before, after))
    assert allowed == set(transitions)
    assert not [step for step, message in refusals.items() if "cannot go from {} to {}".format(*step) not in message]


def test_no_transition_leaves_a_terminal_state() -> None:
    assert not [step for step in JOB_TRANSITIONS if step[0] in TERMINAL]
    ends = {UnitState.SUCCEEDED, UnitState.FAILED, UnitState.CANCELLED}
    assert not [step for step in UNIT_TRANSITIONS if step[0] in ends]


@pytest.mark.parametrize("status", [s for s in JobStatus if s is not JobStatus.QUEUED])
def test_a_job_starts_as_queued_and_as_nothing_else(world: LedgerWorld, status: JobStatus) -> None:
    job_id = world.job()
    copy = text("""
        INSERT INTO selection_jobs (id, tenant_id, key_id, status, pool_id, target_id, model, budget, parameters,
            request, job_metadata, finished_at, error)
        SELECT id || 'x', tenant_id, key_id, CAST(:status AS job_status), pool_id, target_id, model, budget, parameters,
            request, job_metadata, CASE WHEN :terminal THEN now() END, CASE WHEN :status = 'failed' THEN '{}'::jsonb END
        FROM selection_jobs WHERE id = :id
    """)
    with pytest.raises(IntegrityError, match="not as queued"), world.engine.begin() as connection:
        connection.execute(copy, {"id": job_id, "status": status.value, "terminal": status in TERMINAL})
    with (
        world.engine.begin() as connection
    ):  # the same row is taken where it is queued, so it is the trigger that refuses
        connection.execute(copy, {"id": job_id, "status": "queued", "terminal": False})


@pytest.mark.parametrize("state", [s for s in UnitState if s is not UnitState.PENDING])
def test_a_unit_starts_as_pending_and_as_nothing_else(world: LedgerWorld, state: UnitState) -> None:
    job_id = world.job()
    insert = text("""
        INSERT INTO job_units (job_id, stage, shard, artifact_key, spec, state, progress_total, worker_id, started_at,
            lease_expires_at)
        VALUES (:id, 'embed', 0, :id, '{}', CAST(:state AS unit_state), 1, 'w', now(),
            CASE WHEN :state = 'running' THEN now() END)
    """)
    with pytest.raises(IntegrityError, match="not as pending"), world.engine.begin() as connection:
        connection.execute(insert, {"id": job_id, "state": state.value})
    with world.engine.begin() as connection:
        connection.execute(insert, {"id": job_id, "state": "pending"})


def test_provenance_can_be_neither_changed_nor_deleted_nor_lost_with_its_job(world: LedgerWorld) -> None:
    job_id = world.job()
    parameters = {"id": job_id, "root": bytes(32)}
    with world.engine.begin() as connection:
        connection.execute(
            text("INSERT INTO provenance (job_id, weights_root, record) VALUES (:id, :root, '{\"seed\": 1}')"),
            parameters,
        )
    for statement, match in (
        ("UPDATE provenance SET record = '{}' WHERE job_id = :id", "immutable"),
        ("UPDATE provenance SET weights_root = :root WHERE job_id = :id", "immutable"),
        ("DELETE FROM provenance WHERE job_id = :id", "immutable"),
        ("DELETE FROM selection_jobs WHERE id = :id", "fk_provenance_job_id"),
    ):
        with pytest.raises(DBAPIError, match=match), world.engine.begin() as connection:
            connection.execute(text(statement), parameters)
    with world.engine.connect() as connection:
        assert connection.scalar(text("SELECT record FROM provenance WHERE job_id = :id"), parameters) == {"seed": 1}


def test_the_view_expands_chunks_to_samples_at_their_index_in_the_pool(world: LedgerWorld) -> None:
    job_id = world.job()
    insert = text("""
        INSERT INTO weight_chunks (job_id, chunk_no, influence, weight, exact, sha256)
        VALUES (:id, :chunk_no, :influence, :weight, :exact, :sha256)
    """)
    chunks = [
        (0, [0.5] * 16_384, [0.0] * 16_384, [False] * 16_384),
        (1, [1.0, 2.0], [0.25, 0.75], [True, False]),
        (200_000, [3.0], [1.0], [True]),  # its index does not fit into 31 bits
    ]
    with world.engine.begin() as connection:
        for chunk_no, influence, weight, exact in chunks:
            values = {"chunk_no": chunk_no, "influence": influence, "weight": weight, "exact": exact}
            connection.execute(insert, {"id": job_id, "sha256": bytes(32), **values})
        view = "FROM sample_weights WHERE job_id = :id"
        first = connection.execute(
            text(f"SELECT min(sample_index), max(sample_index), count(*) {view} AND influence = 0.5"), {"id": job_id}
        ).one()
        others = connection.execute(
            text(f"SELECT sample_index, influence, weight, exact {view} AND influence <> 0.5 ORDER BY 1"),
            {"id": job_id},
        ).all()
    assert tuple(first) == (0, 16_383, 16_384)
    assert [tuple(row) for row in others] == [
        (16_384, 1.0, 0.25, True),
        (16_385, 2.0, 0.75, False),
        (200_000 * 16_384, 3.0, 1.0, True),
    ]


@pytest.mark.parametrize(
    ("statement", "constraint"),
    [
        ("UPDATE selection_jobs SET budget = 0", "ck_selection_jobs_budget_positive"),
        ("UPDATE selection_jobs SET finished_at = now()", "ck_selection_jobs_finished_when_terminal"),
        ("UPDATE selection_jobs SET error = '{}'", "ck_selection_jobs_error_when_failed"),
        ("UPDATE job_units SET lease_expires_at = now()", "ck_job_units_lease_when_running"),
        ("UPDATE job_units SET progress_done = progress_total + 1", "ck_job_units_progress_within_total"),
        ("UPDATE job_units SET state = 'running', lease_expires_at = now()", "ck_job_units_lease_when_running"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(world: LedgerWorld, statement: str, constraint: str) -> None:
    world.job()
    with pytest.raises(IntegrityError, match=constraint), world.engine.begin() as connection:
        connection.execute(text(statement))


def test_a_job_takes_its_units_and_events_with_it(world: LedgerWorld) -> None:
    job_id = world.job(unit(Stage.PREPARE), unit(Stage.EMBED))
    with world.engine.begin() as connection:
        connection.execute(text("DELETE FROM selection_jobs WHERE id = :id"), {"id": job_id})
        left = "SELECT count(*) FROM job_units WHERE job_id = :id"
        assert connection.scalar(text(left), {"id": job_id}) == 0
    assert world.events(job_id) == []


def test_the_tables_are_those_of_the_models(world: LedgerWorld) -> None:
    assert set(inspect(world.engine).get_table_names()) == {*metadata.tables, "alembic_version"}


# From the first version to this one, with data


@pytest.fixture
def first(postgres_url: str) -> Iterator[tuple[str, Engine]]:
    """A database of the first version with an owner of jobs."""
    with new_database(postgres_url, migrated=False) as url:
        upgrade(url, "0001")
        engine = create_engine(DatabaseSettings(url=url).url)
        with engine.begin() as connection:
            connection.execute(
                text("""
                INSERT INTO tenants (id, name) VALUES ('t', 't');
                INSERT INTO api_keys (id, tenant_id, name, prefix, digest) VALUES ('k', 't', 'k', 'p', sha256('x'));
                INSERT INTO datasets (id, tenant_id, name, fingerprint, row_count, byte_count, sources)
                VALUES ('d', 't', 'd', repeat('0', 64), 4, 40, '{}');
            """)
            )
        yield url, engine
        engine.dispose()


OLD_PARAMETERS = {
    "method": "influence_distillation",
    "landmarks": {"count": 64},
    "embedding": {"kind": "hidden", "pooling": "last", "blocks": 3, "tangents": 5},
    "gradient": {"projection_dim": 512, "normalize": True},
    "kernel": {"kind": "linear", "ridge": 0.5, "bandwidth": 2.0},
    "selection": "weighted",
    "dtype": "float32",
    "max_length": 128,
    "seed": 9,
}


def add_job(engine: Engine, job_id: str, parameters: dict[str, Any], *stages: str) -> None:
    with engine.begin() as connection:
        connection.execute(
            text("""
            INSERT INTO selection_jobs (id, tenant_id, key_id, status, pool_id, target_id, model, budget, parameters,
                request, job_metadata)
            VALUES (:id, 't', 'k', 'queued', 'd', 'd', '{}', 1, CAST(:parameters AS jsonb), '{}', '{}')
        """),
            {"id": job_id, "parameters": json.dumps(parameters)},
        )
        for stage in stages:
            connection.execute(
                text("""
                INSERT INTO job_units (job_id, stage, shard, artifact_key, spec, state, progress_total)
                VALUES (:id, CAST(:stage AS stage), 0, :stage, '{}', 'pending', 1)
            """),
                {"id": job_id, "stage": stage},
            )


def parameters_of(engine: Engine, job_id: str) -> dict[str, Any]:
    with engine.connect() as connection:
        found = connection.scalar(text("SELECT parameters FROM selection_jobs WHERE id = :id"), {"id": job_id})
    assert isinstance(found, dict)
    return found


def test_a_job_of_the_first_version_says_what_it_computed_and_comes_back_unchanged(first: tuple[str, Engine]) -> None:
    url, engine = first
    old_stages = ["prepare", "embed", "landmark_gradients", "target_gradients", "propagate", "select", "publish"]
    add_job(engine, "a", OLD_PARAMETERS, *old_stages)
    upgrade(url)
    found = parameters_of(engine, "a")
    read = JobParameters.model_validate(found)
    assert read.model_dump(mode="json") == found, "written out in full"
    assert (read.refine, read.validate_selection, read.optimizer.type) == (0.0, False, "none")
    assert {**found, **OLD_PARAMETERS} | {k: found[k] for k in ("landmarks", "gradient")} == found
    with engine.connect() as connection:
        in_order = connection.scalars(text("SELECT stage::text FROM job_units u ORDER BY u.stage")).all()
    assert in_order == [stage.value for stage in Stage if stage.value in old_stages]
    add_job(engine, "b", found, *(stage.value for stage in Stage if stage.value in old_stages))
    command.downgrade(alembic_config(url), "0001")
    assert parameters_of(engine, "a") == parameters_of(engine, "b") == OLD_PARAMETERS
    upgrade(url)
    assert parameters_of(engine, "a") == found


@pytest.mark.parametrize(
    ("change", "stage"),
    [({"refine": 0.2}, "prepare"), ({"method": "random"}, "prepare"), ({"validate": True}, "prepare"), ({}, "warmup")],
)
def test_a_downgrade_that_would_leave_jobs_unreadable_is_refused(
    first: tuple[str, Engine], change: dict[str, Any], stage: str
) -> None:
    url, engine = first
    add_job(engine, "a", OLD_PARAMETERS)
    upgrade(url)
    add_job(engine, "b", parameters_of(engine, "a") | change, stage)
    with pytest.raises(DBAPIError, match="1 jobs use what the older version does not know"):
        command.downgrade(alembic_config(url), "0001")
    with engine.connect() as connection:
        revision = connection.scalar(text("SELECT version_num FROM alembic_version"))
    assert revision == "0002", "each migration has its own transaction, so that the ones before stay done"


# Migrations and others who use the database


def revision_of(engine: Engine) -> str | None:
    with engine.connect() as connection:
        return connection.scalar(text("SELECT version_num FROM alembic_version"))


@contextmanager
def reading(engine: Engine, table: str) -> Iterator[Connection]:
    """A transaction that has read the table, and so stands in the way of altering it, until it is ended."""
    with engine.connect() as connection:
        connection.execute(text(f"SELECT * FROM {table}"))
        yield connection


def test_a_migration_gives_way_to_a_long_query_and_changes_nothing(first: tuple[str, Engine]) -> None:
    url, engine = first
    told: list[str] = []
    with (
        reading(engine, "job_units"),
        pytest.raises(MigrationError, match=r"gave up after 1 attempts: no lock for `ALTER TABLE job_units .*session"),
    ):
        upgrade(url, patience_seconds=0, tell=told.append)
    assert (revision_of(engine), told) == ("0001", [])
    upgrade(url, tell=told.append)
    assert told == []


@pytest.fixture
def second(first: tuple[str, Engine], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Engine]:
    """A database of the second version, whose migrations wait for locks only a moment."""
    monkeypatch.setattr("service.schema._LOCK_SECONDS", 0.2)
    monkeypatch.setattr("service.schema._PAUSE_SECONDS", (0.05,))
    upgrade(first[0], "0002")
    return first


@pytest.mark.parametrize("table", ["job_units", "selection_jobs"])
def test_a_migration_is_tried_again_until_it_has_its_locks(second: tuple[str, Engine], table: str) -> None:
    url, engine = second
    told: list[str] = []
    with reading(engine, table) as reader:
        session = reader.scalar(text("SELECT pg_backend_pid()"))

        def tell(message: str) -> None:
            told.append(message)
            if len(told) == 3:
                reader.rollback()

        before = upgrade(url, tell=tell)
    assert (before.current, revision_of(engine)) == ("0002", before.newest)
    assert len(told) == 3
    assert f"ALTER TABLE {table}" in told[0]
    assert f"session {session} " in told[0]
    assert upgrade(url).current == HEAD


def test_what_is_no_matter_of_locks_is_told_at_once(second: tuple[str, Engine]) -> None:
    url, engine = second
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE worker_processes ()"))
    told: list[str] = []
    with pytest.raises(MigrationError, match=r'^a migration failed: relation "worker_processes" already exists$'):
        upgrade(url, tell=told.append)
    assert (revision_of(engine), told) == ("0002", [])
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE worker_processes"))
    upgrade(url)  # on what the failed one has left
    assert revision_of(engine) == HEAD


def test_the_migrations_before_the_one_that_fails_are_done(
    first: tuple[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, engine = first
    monkeypatch.setattr("service.schema._LOCK_SECONDS", 0.2)
    with reading(engine, "selection_jobs"), pytest.raises(MigrationError, match="gave up"):
        upgrade(url, patience_seconds=0)
    assert revision_of(engine) == "0002"


def test_a_waiting_migration_holds_no_table_that_a_request_may_need(first: tuple[str, Engine]) -> None:
    url, engine = first
    upgrade(url, "0002")
    waits = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'selection_jobs'::regclass")
    with reading(engine, "selection_jobs") as reader, ThreadPoolExecutor(1) as pool:
        migration = pool.submit(upgrade, url)
        wait_until(lambda: reader.scalar(waits), 60, "the migration waits")
        # Had it both tables in one transaction, each would wait for the other now.
        reader.execute(text("LOCK TABLE job_units IN ROW EXCLUSIVE MODE NOWAIT"))
        reader.rollback()
        migration.result()
    assert revision_of(engine) == HEAD


def test_one_migration_at_a_time_in_a_database(postgres_url: str) -> None:
    with new_database(postgres_url) as url, new_database(postgres_url) as other, migrating(url) as connection:
        session = connection.scalar(text("SELECT pg_backend_pid()"))
        refused = rf"^another migration runs: session {session} \(user postgres, winnow-migrate, from this host\) holds"
        with pytest.raises(MigrationError, match=refused):
            upgrade(url)
        with pytest.raises(MigrationError, match=refused):
            command.downgrade(alembic_config(url), "base")
        upgrade(other)
        result = CliRunner().invoke(app, ["migrate"], env={"WINNOW_DATABASE__URL": url})
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("winnow: another migration runs: session")
    upgrade_again = CliRunner().invoke(app, ["migrate"], env={"WINNOW_DATABASE__URL": postgres_url})
    assert (upgrade_again.exit_code, upgrade_again.stdout) == (0, f"The database is at {HEAD} already.\n")


def test_the_command_says_from_where_to_where_and_what_went_wrong(postgres_url: str) -> None:
    def migrate(url: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, ["migrate"], env={"WINNOW_DATABASE__URL": url})
        return result.exit_code, result.stdout, result.stderr

    with new_database(postgres_url, migrated=False) as url:
        assert migrate(url) == (0, f"The database went from nothing to {HEAD}.\n", "")
        engine = create_engine(DatabaseSettings(url=url).url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        later = f"The database is at 9999, of a later version than this one, which knows up to {HEAD}.\n"
        assert migrate(url) == (0, later, "")
        assert revision_of(engine) == "9999"
        engine.dispose()
    status, stdout, stderr = migrate("postgresql://nobody:hunter2@127.0.0.1:1/none")
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    assert stderr.startswith("winnow: the database does not answer: ")
    assert "hunter2" not in stderr
    assert migrate("mysql://x")[2].startswith("winnow: WINNOW_DATABASE__URL: must be a postgresql:// URL")


def test_the_stages_of_the_database_are_in_the_order_of_the_table(world: LedgerWorld) -> None:
    with world.engine.connect() as connection:
        found = connection.scalars(text("SELECT unnest(enum_range(NULL::stage))::text")).all()
    assert found == [stage.value for stage in Stage]
