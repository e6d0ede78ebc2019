"""The view of the weights says null where a sample has no influence, which the arrays hold as NaN."""

from alembic import op

revision, down_revision = "0003", "0002"
branch_labels = depends_on = None

VIEW = """
    CREATE OR REPLACE VIEW sample_weights AS
        SELECT c.job_id, c.chunk_no::bigint * 16384 + s.position - 1 AS sample_index, {influence} AS influence, s.weight, s.exact
        FROM weight_chunks c, unnest(c.influence, c.weight, c.exact)
            WITH ORDINALITY AS s (influence, weight, exact, position)
"""


def upgrade() -> None:
    op.execute(VIEW.format(influence="nullif(s.influence, 'NaN')"))


def downgrade() -> None:
    op.execute(VIEW.format(influence="s.influence"))
