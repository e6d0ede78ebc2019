"""Names and labels of jobs, by which lists are filtered; what each job is planned to take, for the estimate of a queue."""

from alembic import op

revision, down_revision = "0011", "0010"
branch_labels = depends_on = None

COLUMNS = """
    ALTER TABLE selection_jobs
        ADD COLUMN name varchar,
        ADD COLUMN labels jsonb NOT NULL DEFAULT '{}',
        ADD COLUMN folded_name varchar,
        ADD COLUMN terms varchar[],
        ADD COLUMN planned_seconds jsonb;
"""

# The jobs that have a name or labels; it costs the others nothing.
INDEX = "CREATE INDEX ix_selection_jobs_terms ON selection_jobs USING gin (terms) WHERE terms IS NOT NULL;"

# As in 0001, with what a person calls the job.
NOTIFY_OF_EVENTS = """
    CREATE OR REPLACE FUNCTION job_events_notify() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        what text := CASE
            WHEN NEW.type IN ('job.running', 'job.succeeded', 'job.failed', 'job.cancelled')
                THEN 'selection_job.' || substr(NEW.type, 5)
            WHEN NEW.type = 'stages.started' THEN 'selection_job.phase'
        END;
    BEGIN
        PERFORM pg_notify('winnow_events', NEW.job_id);
        IF what IS NOT NULL THEN
            INSERT INTO webhook_deliveries (id, endpoint_id, job_id, type, payload, next_attempt_at)
            SELECT 'msg_' || lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0')
                    || left(replace(gen_random_uuid()::text, '-', ''), 20),
                e.id, NEW.job_id, what,
                jsonb_build_object(
                    'type', what,
                    'timestamp', to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
                    'data', jsonb_strip_nulls(jsonb_build_object(
                        'object', 'selection_job', 'id', NEW.job_id,%s
                        'status', CASE what WHEN 'selection_job.phase' THEN 'running' ELSE substr(NEW.type, 5) END,
                        'stages', NEW.data -> 'stages', 'error', NEW.data -> 'error', 'metadata', j.job_metadata))
                )::text,
                clock_timestamp()
            FROM selection_jobs j JOIN webhook_endpoints e ON e.tenant_id = j.tenant_id
            WHERE j.id = NEW.job_id AND e.disabled_at IS NULL AND e.deleted_at IS NULL AND what = ANY (e.events);
            IF FOUND THEN
                PERFORM pg_notify('winnow_webhooks', '');
            END IF;
        END IF;
        RETURN NULL;
    END $$;
"""


def upgrade() -> None:
    for statements in (COLUMNS, INDEX, NOTIFY_OF_EVENTS % " 'name', j.name, 'labels', j.labels,"):
        op.execute(statements)


def downgrade() -> None:
    op.execute(NOTIFY_OF_EVENTS % "")
    op.execute("""
        DROP INDEX ix_selection_jobs_terms;
        ALTER TABLE selection_jobs
            DROP COLUMN name, DROP COLUMN labels, DROP COLUMN folded_name, DROP COLUMN terms, DROP COLUMN planned_seconds;
    """)
