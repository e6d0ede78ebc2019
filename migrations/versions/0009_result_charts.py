"""What pictures of a result are drawn from, apart from its summary: it is larger, and asked for less often."""

from alembic import op

revision, down_revision = "0009", "0008"
branch_labels = depends_on = None


def upgrade() -> None:
    # Results that came before, or that a worker of the previous version publishes, have none.
    op.execute("""
        CREATE TABLE result_charts (
            job_id varchar CONSTRAINT pk_result_charts PRIMARY KEY
                CONSTRAINT fk_result_charts_job_id REFERENCES selection_jobs ON DELETE CASCADE,
            charts jsonb NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now()
        )
    """)


def downgrade() -> None:
    op.execute("DROP TABLE result_charts")
