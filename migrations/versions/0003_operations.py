"""Operations: delays between attempts, deleted jobs, traces, and the workers that run, of one version or of two.

Only adds, so that API and workers of the version before go on working on the new schema. They work meanwhile too: each of the
two tables that they write is altered in a transaction of its own. Holding one while waiting for the other would deadlock with
a request that does the same, and PostgreSQL might end the request.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute(
            "ALTER TABLE job_units ADD COLUMN IF NOT EXISTS not_before timestamptz, ADD COLUMN IF NOT EXISTS code varchar"
        )
    op.add_column("selection_jobs", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("selection_jobs", sa.Column("trace", sa.String(), nullable=True))
    op.create_check_constraint(
        op.f("ck_selection_jobs_deleted_when_terminal"),
        "selection_jobs",
        "deleted_at IS NULL OR finished_at IS NOT NULL",
    )
    op.create_table(
        "worker_processes",
        sa.Column("worker_id", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("stopped_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("pk_worker_processes")),
    )


def downgrade() -> None:
    op.drop_table("worker_processes")
    op.drop_constraint(op.f("ck_selection_jobs_deleted_when_terminal"), "selection_jobs")
    op.drop_column("selection_jobs", "trace")
    op.drop_column("selection_jobs", "deleted_at")
    op.drop_column("job_units", "code")
    op.drop_column("job_units", "not_before")
