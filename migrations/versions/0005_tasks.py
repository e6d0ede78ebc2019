"""Work of workers that is no job's unit."""

from alembic import op

revision, down_revision = "0005", "0003"
branch_labels = depends_on = None

TASKS = """
    CREATE TYPE task_state AS ENUM ('pending', 'running', 'succeeded', 'failed');
    CREATE TABLE tasks (
        id varchar CONSTRAINT pk_tasks PRIMARY KEY,
        kind varchar NOT NULL,
        subject varchar NOT NULL,
        tenant_id varchar NOT NULL CONSTRAINT fk_tasks_tenant_id REFERENCES tenants,
        key_id varchar NOT NULL CONSTRAINT fk_tasks_key_id REFERENCES api_keys,
        urgent boolean NOT NULL DEFAULT false,
        input jsonb NOT NULL,
        state task_state NOT NULL,
        attempt integer NOT NULL DEFAULT 0,
        failures integer NOT NULL DEFAULT 0,
        worker_id varchar,
        lease_expires_at timestamptz,
        not_before timestamptz,
        progress jsonb,
        result jsonb,
        error jsonb,
        started_at timestamptz,
        finished_at timestamptz,
        kept_seconds integer,
        created_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT ck_tasks_lease_when_running CHECK ((state = 'running') = (lease_expires_at IS NOT NULL)),
        CONSTRAINT ck_tasks_finished_when_terminal CHECK ((state IN ('succeeded', 'failed')) = (finished_at IS NOT NULL)),
        CONSTRAINT ck_tasks_error_when_failed CHECK (state <> 'failed' OR error IS NOT NULL)
    );
    CREATE INDEX ix_tasks_pending ON tasks (id) WHERE state = 'pending';
    CREATE INDEX ix_tasks_lease_expires_at ON tasks (lease_expires_at) WHERE state = 'running';
    CREATE INDEX ix_tasks_tenant_id_started_at ON tasks (tenant_id, started_at);
    CREATE INDEX ix_tasks_subject ON tasks (subject);
    CREATE INDEX ix_tasks_kept ON tasks (created_at) WHERE kept_seconds IS NOT NULL;
"""

TRANSITIONS = """
    CREATE FUNCTION tasks_check_transition() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'INSERT' THEN
            IF NEW.state <> 'pending' THEN
                RAISE EXCEPTION 'tasks: % starts as %, not as pending', NEW.id, NEW.state USING ERRCODE = 'check_violation';
            END IF;
        ELSIF NEW.state <> OLD.state AND (OLD.state::text, NEW.state::text) NOT IN (
            ('pending', 'running'), ('running', 'pending'), ('running', 'succeeded'), ('running', 'failed')
        ) THEN
            RAISE EXCEPTION 'tasks: % cannot go from % to %', OLD.id, OLD.state, NEW.state
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER tasks_check_transition BEFORE INSERT OR UPDATE OF state ON tasks
        FOR EACH ROW EXECUTE FUNCTION tasks_check_transition();
"""

# The dispatcher learns of one to claim as of a unit, and requests that wait for its subject of its end.
NOTIFY = """
    CREATE FUNCTION tasks_notify() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.state = 'pending' THEN
            PERFORM pg_notify('winnow_units', '');
        ELSE
            PERFORM pg_notify('winnow_events', NEW.subject);
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER tasks_notify AFTER INSERT OR UPDATE OF state ON tasks
        FOR EACH ROW WHEN (NEW.state <> 'running') EXECUTE FUNCTION tasks_notify();
"""


def upgrade() -> None:
    for statements in (TASKS, TRANSITIONS, NOTIFY):
        op.execute(statements)


def downgrade() -> None:
    op.execute("""
        DROP TABLE tasks;
        DROP FUNCTION tasks_check_transition, tasks_notify;
        DROP TYPE task_state;
    """)
