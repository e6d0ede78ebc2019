"""Jobs that are planned after they were posted."""

from alembic import op

revision, down_revision = "0008", "0007"
branch_labels = depends_on = None

PLANS = """
    ALTER TABLE selection_jobs ADD COLUMN awaits_plan boolean NOT NULL DEFAULT false;
    CREATE INDEX ix_selection_jobs_unplanned ON selection_jobs (id)
        WHERE awaits_plan AND status IN ('queued', 'running');
"""

# The loop that plans is told of a new job, and the dispatcher of one that has its plan, whose first unit may be claimed now.
NOTIFY_OF_PLANS = """
    CREATE FUNCTION plans_notify() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_notify(CASE WHEN NEW.awaits_plan THEN 'winnow_imports' ELSE 'winnow_units' END, '');
        RETURN NULL;
    END $$;
    CREATE TRIGGER selection_jobs_notify_of_new AFTER INSERT ON selection_jobs
        FOR EACH ROW WHEN (NEW.awaits_plan) EXECUTE FUNCTION plans_notify();
    CREATE TRIGGER selection_jobs_notify_of_plan AFTER UPDATE OF awaits_plan ON selection_jobs
        FOR EACH ROW WHEN (OLD.awaits_plan AND NOT NEW.awaits_plan) EXECUTE FUNCTION plans_notify();
"""


def upgrade() -> None:
    op.execute(PLANS)
    op.execute(NOTIFY_OF_PLANS)


def downgrade() -> None:
    op.execute("""
        DROP TRIGGER selection_jobs_notify_of_plan ON selection_jobs;
        DROP TRIGGER selection_jobs_notify_of_new ON selection_jobs;
        DROP FUNCTION plans_notify;
        DROP INDEX ix_selection_jobs_unplanned;
        ALTER TABLE selection_jobs DROP COLUMN awaits_plan;
    """)
