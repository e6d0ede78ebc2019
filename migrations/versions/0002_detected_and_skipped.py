"""Datasets say what was taken of their uploads, and how many rows were skipped."""

from alembic import op

revision, down_revision = "0002", "0001"
branch_labels = depends_on = None


def upgrade() -> None:
    # `detected` is null in datasets that came before, or from the previous version while it still serves.
    op.execute("""
        ALTER TABLE datasets
            ADD COLUMN detected jsonb,
            ADD COLUMN skipped bigint NOT NULL DEFAULT 0,
            ADD COLUMN skipped_bytes bigint NOT NULL DEFAULT 0
    """)


def downgrade() -> None:
    op.execute("ALTER TABLE datasets DROP COLUMN detected, DROP COLUMN skipped, DROP COLUMN skipped_bytes")
