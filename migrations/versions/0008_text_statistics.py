"""The stage that counts the pool's tokens, for embeddings from text."""

from alembic import op

revision, down_revision = "0008", "0007"
branch_labels = depends_on = None


def upgrade() -> None:
    op.execute("ALTER TYPE stage ADD VALUE 'text_statistics' AFTER 'target_gradients'")


def downgrade() -> None:
    """PostgreSQL cannot take a value from a type; one that no row uses does no harm."""
