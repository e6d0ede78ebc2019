"""Datasets that a worker imports from the hub, and jobs that wait for them."""

from alembic import op

revision, down_revision = "0007", "0006"
branch_labels = depends_on = None

UPGRADE = """
    ALTER TABLE datasets
        ADD COLUMN origin jsonb,
        ALTER COLUMN fingerprint DROP NOT NULL,
        ALTER COLUMN row_count DROP NOT NULL,
        ALTER COLUMN byte_count DROP NOT NULL,
        ALTER COLUMN sources DROP NOT NULL,
        ADD CONSTRAINT ck_datasets_filled_unless_imported CHECK (
            origin IS NOT NULL OR num_nulls(fingerprint, row_count, byte_count, sources) = 0
        ),
        ADD CONSTRAINT ck_datasets_filled_at_once CHECK (num_nulls(fingerprint, row_count, byte_count, sources) IN (0, 4));
    ALTER TABLE selection_jobs
        ADD COLUMN awaits_datasets boolean NOT NULL DEFAULT false,
        ALTER COLUMN budget DROP NOT NULL,
        ADD CONSTRAINT ck_selection_jobs_budget_once_started CHECK (budget IS NOT NULL OR awaits_datasets);
    CREATE INDEX ix_selection_jobs_awaiting ON selection_jobs (id) WHERE awaits_datasets AND status = 'queued';
"""

# The end of an import is notified apart from other events, to the loop that starts the jobs that wait for it; so is a new job that
# waits, whose dataset may have become ready meanwhile.
NOTIFY_OF_IMPORTS = """
    CREATE FUNCTION imports_notify() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_notify('winnow_imports', '');
        RETURN NULL;
    END $$;
    CREATE TRIGGER tasks_notify_of_import AFTER UPDATE OF state ON tasks
        FOR EACH ROW WHEN (NEW.kind = 'import_dataset' AND NEW.state IN ('succeeded', 'failed')) EXECUTE FUNCTION imports_notify();
    CREATE TRIGGER selection_jobs_notify_of_import AFTER INSERT ON selection_jobs
        FOR EACH ROW WHEN (NEW.awaits_datasets) EXECUTE FUNCTION imports_notify();
"""

TRANSITION = """
    CREATE OR REPLACE FUNCTION selection_jobs_check_transition() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'INSERT' THEN
            IF NEW.status <> 'queued' THEN
                RAISE EXCEPTION 'selection_jobs: % starts as %, not as queued', NEW.id, NEW.status
                    USING ERRCODE = 'check_violation';
            END IF;
        ELSIF NEW.status <> OLD.status
            AND (OLD.status::text, NEW.status::text) NOT IN (
                ('queued', 'running'), ('queued', 'cancelled'), {more}
                ('running', 'cancelling'), ('running', 'cancelled'), ('running', 'succeeded'), ('running', 'failed'),
                ('cancelling', 'cancelled')
            ) THEN
            RAISE EXCEPTION 'selection_jobs: % cannot go from % to %', OLD.id, OLD.status, NEW.status
                USING ERRCODE = 'check_violation';
        END IF;
        RETURN NEW;
    END $$;
"""


def upgrade() -> None:
    op.execute(UPGRADE)
    op.execute(NOTIFY_OF_IMPORTS)
    op.execute(TRANSITION.format(more="('queued', 'failed'),"))


def downgrade() -> None:
    op.execute("DELETE FROM tasks WHERE kind = 'import_dataset' AND state IN ('pending', 'running')")
    op.execute("""
        DROP TRIGGER selection_jobs_notify_of_import ON selection_jobs;
        DROP TRIGGER tasks_notify_of_import ON tasks;
        DROP FUNCTION imports_notify;
        DROP INDEX ix_selection_jobs_awaiting;
        ALTER TABLE selection_jobs DROP COLUMN awaits_datasets CASCADE, ALTER COLUMN budget SET NOT NULL;
        ALTER TABLE datasets DROP COLUMN origin CASCADE,
            ALTER COLUMN fingerprint SET NOT NULL,
            ALTER COLUMN row_count SET NOT NULL,
            ALTER COLUMN byte_count SET NOT NULL,
            ALTER COLUMN sources SET NOT NULL,
            DROP CONSTRAINT ck_datasets_filled_at_once;
    """)
    op.execute(TRANSITION.format(more=""))
