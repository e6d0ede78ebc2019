"""The migrations against the models, and what PostgreSQL itself holds: transitions, immutability, the view, names."""

import itertools
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from support.ledger_model import JOB_TRANSITIONS, UNIT_TRANSITIONS
from support.ledger_world import LedgerWorld, ledger_world, new_database, unit

from service.db.migrate import alembic_config, upgrade
from service.ledger.state import TERMINAL, JobStatus, UnitState
from service.plan.stages import Stage
from service.settings import DatabaseSettings
from service.tables import metadata

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


def _walk(steps: set[tuple[Any, Any]], start: StrEnum, end: StrEnum) -> list[StrEnum]:
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
    world: LedgerWorld, states: type[StrEnum], first: StrEnum, transitions: set[tuple[Any, Any]], change: Any
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
    ends = set(UnitState) - {UnitState.PENDING, UnitState.RUNNING}
    remade = (UnitState.SUCCEEDED, UnitState.PENDING)  # its artifact is missing or damaged
    assert [step for step in UNIT_TRANSITIONS if step[0] in ends] == [remade]


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
        ("UPDATE provenance SET record = '{}' WHERE job_id = :id", "append-only"),
        ("UPDATE provenance SET weights_root = :root WHERE job_id = :id", "append-only"),
        ("DELETE FROM provenance WHERE job_id = :id", "append-only"),
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
        (1, [1.0, float("nan"), 2.0], [0.25, 0.0, 0.75], [True, False, False]),
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
            text(f"SELECT sample_index, influence, weight, exact {view} AND influence IS DISTINCT FROM 0.5 ORDER BY 1"),
            {"id": job_id},
        ).all()
    assert tuple(first) == (0, 16_383, 16_384)
    assert [tuple(row) for row in others] == [
        (16_384, 1.0, 0.25, True),
        (16_385, None, 0.0, False),
        (16_386, 2.0, 0.75, False),
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


# Migrations and others who use the database


def test_the_stages_of_the_database_are_in_the_order_of_the_table(world: LedgerWorld) -> None:
    with world.engine.connect() as connection:
        found = connection.scalars(text("SELECT unnest(enum_range(NULL::stage))::text")).all()
    assert found == [stage.value for stage in Stage]
