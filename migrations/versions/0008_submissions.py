"""Jobs that are planned after they were posted, and counters of what the jobs of a key use of its quotas."""

from alembic import op

revision, down_revision = "0008", "0007"
branch_labels = depends_on = None

PLANS = """
    ALTER TABLE selection_jobs ADD COLUMN awaits_plan boolean NOT NULL DEFAULT false;
    CREATE INDEX ix_selection_jobs_unplanned ON selection_jobs (id)
        WHERE awaits_plan AND status IN ('queued', 'running');
"""

# The loop that plans is told of a new job, and the dispatcher of one that has its plan, whose first unit may be claimed now; it was
# not told of that unit before, in vain.
NOTIFY_OF_PLANS = """
    CREATE OR REPLACE FUNCTION job_units_notify() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'UPDATE' OR NOT (SELECT awaits_plan FROM selection_jobs WHERE id = NEW.job_id) THEN
            PERFORM pg_notify('winnow_units', '');
        END IF;
        RETURN NULL;
    END $$;
    CREATE FUNCTION plans_notify() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.awaits_plan THEN
            PERFORM pg_notify('winnow_imports', 'plan');
        ELSE
            PERFORM pg_notify('winnow_units', '');
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER selection_jobs_notify_of_new AFTER INSERT ON selection_jobs
        FOR EACH ROW WHEN (NEW.awaits_plan) EXECUTE FUNCTION plans_notify();
    CREATE TRIGGER selection_jobs_notify_of_plan AFTER UPDATE OF awaits_plan ON selection_jobs
        FOR EACH ROW WHEN (OLD.awaits_plan AND NOT NEW.awaits_plan) EXECUTE FUNCTION plans_notify();
"""

COUNTERS = """
    CREATE TABLE key_usage (
        key_id varchar CONSTRAINT pk_key_usage PRIMARY KEY CONSTRAINT fk_key_usage_key_id REFERENCES api_keys,
        open_jobs bigint NOT NULL DEFAULT 0,
        samples bigint NOT NULL DEFAULT 0
    ) WITH (fillfactor = 50);
    CREATE TABLE key_samples (
        key_id varchar NOT NULL CONSTRAINT fk_key_samples_key_id REFERENCES api_keys,
        second timestamptz NOT NULL,
        samples_before bigint NOT NULL,
        CONSTRAINT pk_key_samples PRIMARY KEY (key_id, second)
    );
    CREATE INDEX ix_key_samples_second ON key_samples (second);
    CREATE INDEX ix_key_samples_sum ON key_samples (key_id, samples_before, second);
"""

# Whoever writes a job, ends it or removes it: the counters are right in the same transaction. The row of the key's usage is locked by
# that, so the seconds of its samples come in the order of their sums.
COUNT = """
    CREATE FUNCTION key_usage_add(of_key varchar, more_jobs bigint, more_samples bigint) RETURNS void LANGUAGE plpgsql AS $$
    DECLARE
        sum_before bigint;
    BEGIN
        INSERT INTO key_usage AS u (key_id, open_jobs, samples) VALUES (of_key, more_jobs, more_samples)
            ON CONFLICT (key_id) DO UPDATE SET open_jobs = u.open_jobs + more_jobs, samples = u.samples + more_samples
            RETURNING samples - more_samples INTO sum_before;
        INSERT INTO key_samples (key_id, second, samples_before)
            VALUES (of_key, date_trunc('second', clock_timestamp()), sum_before) ON CONFLICT DO NOTHING;
    END $$;
    CREATE FUNCTION selection_jobs_count() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'INSERT' THEN
            PERFORM key_usage_add(NEW.key_id, 1, coalesce((SELECT row_count FROM datasets WHERE id = NEW.pool_id), 0)
                + coalesce((SELECT row_count FROM datasets WHERE id = NEW.target_id), 0));
        ELSE
            UPDATE key_usage SET open_jobs = open_jobs - 1 WHERE key_id = OLD.key_id;
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER selection_jobs_count AFTER INSERT ON selection_jobs
        FOR EACH ROW EXECUTE FUNCTION selection_jobs_count();
    CREATE TRIGGER selection_jobs_count_end AFTER UPDATE OF status ON selection_jobs FOR EACH ROW
        WHEN (OLD.finished_at IS NULL AND NEW.finished_at IS NOT NULL) EXECUTE FUNCTION selection_jobs_count();
    CREATE TRIGGER selection_jobs_count_removal AFTER DELETE ON selection_jobs FOR EACH ROW
        WHEN (OLD.finished_at IS NULL) EXECUTE FUNCTION selection_jobs_count();
"""

# Of the jobs that are there; the lock of the triggers that were created just before keeps others away until this is committed.
FILL = """
    INSERT INTO key_usage (key_id, open_jobs, samples)
        SELECT k.id, (SELECT count(*) FROM selection_jobs WHERE key_id = k.id AND finished_at IS NULL), coalesce((
            SELECT sum(coalesce(p.row_count, 0) + coalesce(t.row_count, 0)) FROM selection_jobs j
                JOIN datasets p ON p.id = j.pool_id JOIN datasets t ON t.id = j.target_id
            WHERE j.key_id = k.id AND j.created_at > now() - interval '1 day'
        ), 0) FROM api_keys k;
    INSERT INTO key_samples (key_id, second, samples_before)
        SELECT key_id, second, sum(samples) OVER (PARTITION BY key_id ORDER BY second) - samples FROM (
            SELECT j.key_id, date_trunc('second', j.created_at) AS second,
                sum(coalesce(p.row_count, 0) + coalesce(t.row_count, 0)) AS samples
            FROM selection_jobs j JOIN datasets p ON p.id = j.pool_id JOIN datasets t ON t.id = j.target_id
            WHERE j.created_at > now() - interval '1 day' GROUP BY 1, 2
        ) seconds;
"""


def upgrade() -> None:
    for statements in (PLANS, NOTIFY_OF_PLANS, COUNTERS, COUNT, FILL):
        op.execute(statements)


def downgrade() -> None:
    op.execute("""
        CREATE OR REPLACE FUNCTION job_units_notify() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_notify('winnow_units', '');
            RETURN NULL;
        END $$;
        DROP TRIGGER selection_jobs_count ON selection_jobs;
        DROP TRIGGER selection_jobs_count_end ON selection_jobs;
        DROP TRIGGER selection_jobs_count_removal ON selection_jobs;
        DROP FUNCTION selection_jobs_count, key_usage_add;
        DROP TABLE key_samples, key_usage;
        DROP TRIGGER selection_jobs_notify_of_plan ON selection_jobs;
        DROP TRIGGER selection_jobs_notify_of_new ON selection_jobs;
        DROP FUNCTION plans_notify;
        DROP INDEX ix_selection_jobs_unplanned;
        ALTER TABLE selection_jobs DROP COLUMN awaits_plan;
    """)
