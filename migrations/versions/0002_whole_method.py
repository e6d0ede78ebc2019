"""The whole method: its stages, the machines that were seen, and old jobs' parameters written out as they were computed."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

OLD_STAGES = ("prepare", "embed", "landmark_gradients", "target_gradients", "propagate", "select", "publish")
STAGES = (
    *("prepare", "warmup", "landmark_gradients", "target_gradients", "candidates", "choose_embedding", "curvature"),
    *("embed", "embed_target", "propagate", "refine", "select", "validate", "publish"),
)

# What the first version computed, in the parameters of this one. Its default would be another for some of them.
FIRST_VERSION = """{
    "optimizer": {"type": "none", "learning_rate": 0.001, "betas": [0.9, 0.999], "eps": 1e-08, "momentum": 0.0,
                  "weight_decay": 0.0, "scaling": "exact"},
    "warmup": null, "refine": 0.0, "min_fidelity": null, "curvature": {"type": "none", "rank": 32},
    "validate": false, "quantization": "none"
}"""
FIRST_KEYS = "{optimizer, warmup, refine, min_fidelity, curvature, validate, quantization}"


def _recreate_stage(stages: tuple[str, ...]) -> None:
    """The units are sorted by stage, so the order counts; ALTER TYPE ... ADD VALUE cannot be undone."""
    op.execute("ALTER TYPE stage RENAME TO stage_before")
    op.execute(f"CREATE TYPE stage AS ENUM ({', '.join(repr(stage) for stage in stages)})")
    op.execute("ALTER TABLE job_units ALTER COLUMN stage TYPE stage USING stage::text::stage")
    op.execute("DROP TYPE stage_before")


def upgrade() -> None:
    # The ledger's tables are locked for a moment. Behind a long query this fails and can be tried again: waiting would
    # make every claim and heartbeat wait with it.
    op.execute("SET LOCAL lock_timeout = '5s'")
    _recreate_stage(STAGES)
    op.execute(f"""
        UPDATE selection_jobs
        SET parameters = jsonb_set(jsonb_set('{FIRST_VERSION}'::jsonb || parameters,
            '{{landmarks, choice}}', '"uniform"'), '{{gradient, modules}}', '"down_proj"')
        WHERE parameters ? 'landmarks' AND NOT parameters ? 'refine'
    """)
    op.create_index(
        "ix_job_units_stage_finished_at",
        "job_units",
        ["stage", "finished_at"],
        unique=False,
        postgresql_where="state = 'succeeded'",
    )
    op.create_table(
        "workers",
        sa.Column("worker_id", sa.String(), nullable=False),
        sa.Column("device", sa.String(), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("matmul_rates", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("pk_workers")),
    )


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    _refuse_newer_jobs()
    op.drop_table("workers")
    op.drop_index("ix_job_units_stage_finished_at", "job_units")
    op.execute(f"""
        UPDATE selection_jobs
        SET parameters = (parameters - '{FIRST_KEYS}'::text[]) #- '{{landmarks, choice}}' #- '{{gradient, modules}}'
        WHERE parameters ? 'refine'
    """)
    _recreate_stage(OLD_STAGES)


def _refuse_newer_jobs() -> None:
    """The first version reads every job's parameters and refuses what it does not know; nothing is thrown away for it."""
    op.execute(f"""
        DO $$
        DECLARE newer bigint;
        BEGIN
            SELECT count(*) INTO newer FROM selection_jobs j
            WHERE parameters ? 'refine' AND NOT (
                parameters @> '{FIRST_VERSION}'
                AND parameters @> '{{"method": "influence_distillation", "landmarks": {{"choice": "uniform"}}}}'
                AND parameters @> '{{"gradient": {{"modules": "down_proj"}}}}'
                AND parameters #>> '{{gradient, projection_dim}}' IS NOT NULL
                AND parameters #>> '{{embedding, kind}}' IN ('jvp', 'hidden')
            ) OR EXISTS (
                SELECT FROM job_units u WHERE u.job_id = j.id AND u.stage::text <> ALL ('{{{", ".join(OLD_STAGES)}}}')
            );
            IF newer > 0 THEN
                RAISE EXCEPTION '% jobs use what the older version does not know; it could not read them', newer
                    USING HINT = 'Go back to a backup that was made before the upgrade.';
            END IF;
        END $$
    """)
