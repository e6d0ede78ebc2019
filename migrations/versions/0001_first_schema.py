"""The first schema: tenants, datasets, the job ledger, results; transitions and immutability held by triggers."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

JOB_TRANSITIONS = """
    ('queued', 'running'), ('queued', 'cancelled'),
    ('running', 'cancelling'), ('running', 'cancelled'), ('running', 'succeeded'), ('running', 'failed'),
    ('cancelling', 'cancelled')
"""
UNIT_TRANSITIONS = """
    ('pending', 'running'), ('pending', 'cancelled'),
    ('running', 'pending'), ('running', 'succeeded'), ('running', 'failed'), ('running', 'cancelled')
"""


def _hold_transitions(table: str, column: str, first: str, transitions: str) -> None:
    """A trigger that lets `column` start as `first` and change only along the transitions."""
    op.execute(f"""
        CREATE FUNCTION {table}_hold_transitions() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'INSERT' THEN
                IF NEW.{column} <> '{first}' THEN
                    RAISE EXCEPTION '{table}: % starts as %, not as {first}', NEW.id, NEW.{column}
                        USING ERRCODE = 'check_violation';
                END IF;
            ELSIF NEW.{column} <> OLD.{column}
                AND (OLD.{column}::text, NEW.{column}::text) NOT IN ({transitions}) THEN
                RAISE EXCEPTION '{table}: % cannot go from % to %', OLD.id, OLD.{column}, NEW.{column}
                    USING ERRCODE = 'check_violation';
            END IF;
            RETURN NEW;
        END $$
    """)
    op.execute(f"""
        CREATE TRIGGER {table}_hold_transitions BEFORE INSERT OR UPDATE OF {column} ON {table}
        FOR EACH ROW EXECUTE FUNCTION {table}_hold_transitions()
    """)


def _notify_of_units() -> None:
    """Whenever there may be a unit to claim (a new one, one given back, or an artifact that another waited for)."""
    op.execute("""
        CREATE FUNCTION job_units_notify() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_notify('winnow_units', '');
            RETURN NULL;
        END $$
    """)
    op.execute("""
        CREATE TRIGGER job_units_notify AFTER INSERT OR UPDATE OF state ON job_units
        FOR EACH ROW WHEN (NEW.state <> 'running') EXECUTE FUNCTION job_units_notify()
    """)


def _freeze_provenance() -> None:
    op.execute("""
        CREATE FUNCTION provenance_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'provenance of % is immutable', OLD.job_id USING ERRCODE = 'restrict_violation';
        END $$
    """)
    op.execute("""
        CREATE TRIGGER provenance_refuse_change BEFORE UPDATE OR DELETE ON provenance
        FOR EACH ROW EXECUTE FUNCTION provenance_refuse_change()
    """)


def _expand_weights() -> None:
    op.execute("""
        CREATE VIEW sample_weights AS
        SELECT c.job_id, c.chunk_no::bigint * 16384 + s.position - 1 AS sample_index, s.influence, s.weight, s.exact
        FROM weight_chunks c, unnest(c.influence, c.weight, c.exact)
            WITH ORDINALITY AS s (influence, weight, exact, position)
    """)


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
        sa.UniqueConstraint("name", name=op.f("uq_tenants_name")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("prefix", sa.String(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("length(digest) = 32", name=op.f("ck_api_keys_digest_is_sha256")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_api_keys_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("prefix", name=op.f("uq_api_keys_prefix")),
    )
    op.create_index(op.f("ix_api_keys_tenant_id"), "api_keys", ["tenant_id"], unique=False)
    op.create_table(
        "datasets",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("row_count", sa.BigInteger(), nullable=False),
        sa.Column("byte_count", sa.BigInteger(), nullable=False),
        sa.Column("sources", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("length(fingerprint) = 64", name=op.f("ck_datasets_fingerprint_is_sha256")),
        sa.CheckConstraint("row_count > 0", name=op.f("ck_datasets_has_rows")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_datasets_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_datasets")),
    )
    op.create_index("ix_datasets_fingerprint", "datasets", ["fingerprint"], unique=False)
    op.create_index("ix_datasets_tenant_id_id", "datasets", ["tenant_id", "id"], unique=False)
    op.create_table(
        "selection_jobs",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column(
            "status",
            sa.Enum("queued", "running", "cancelling", "succeeded", "failed", "cancelled", name="job_status"),
            nullable=False,
        ),
        sa.Column("pool_id", sa.String(), nullable=False),
        sa.Column("target_id", sa.String(), nullable=False),
        sa.Column("model", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("budget", sa.BigInteger(), nullable=False),
        sa.Column("parameters", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("request", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("job_metadata", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "(status = 'failed') = (error IS NOT NULL)", name=op.f("ck_selection_jobs_error_when_failed")
        ),
        sa.CheckConstraint(
            "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)",
            name=op.f("ck_selection_jobs_finished_when_terminal"),
        ),
        sa.CheckConstraint("budget > 0", name=op.f("ck_selection_jobs_budget_positive")),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_selection_jobs_key_id")),
        sa.ForeignKeyConstraint(["pool_id"], ["datasets.id"], name=op.f("fk_selection_jobs_pool_id")),
        sa.ForeignKeyConstraint(["target_id"], ["datasets.id"], name=op.f("fk_selection_jobs_target_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_selection_jobs_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_selection_jobs")),
    )
    op.create_index(
        "ix_selection_jobs_open",
        "selection_jobs",
        ["created_at"],
        unique=False,
        postgresql_where="status IN ('queued', 'running', 'cancelling')",
    )
    op.create_index("ix_selection_jobs_pool_id", "selection_jobs", ["pool_id"], unique=False)
    op.create_index("ix_selection_jobs_target_id", "selection_jobs", ["target_id"], unique=False)
    op.create_index("ix_selection_jobs_tenant_id_id", "selection_jobs", ["tenant_id", "id"], unique=False)
    op.create_table(
        "job_events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("data", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["selection_jobs.id"], name=op.f("fk_job_events_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_events")),
    )
    op.create_index("ix_job_events_job_id_id", "job_events", ["job_id", "id"], unique=False)
    op.create_table(
        "job_results",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("sample_count", sa.BigInteger(), nullable=False),
        sa.Column("summary", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["selection_jobs.id"], name=op.f("fk_job_results_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_job_results")),
    )
    op.create_table(
        "job_units",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column(
            "stage",
            sa.Enum(
                "prepare",
                "embed",
                "landmark_gradients",
                "target_gradients",
                "propagate",
                "select",
                "publish",
                name="stage",
            ),
            nullable=False,
        ),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("artifact_key", sa.String(), nullable=False),
        sa.Column("spec", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column(
            "state",
            sa.Enum("pending", "running", "succeeded", "failed", "cancelled", name="unit_state"),
            nullable=False,
        ),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("worker_id", sa.String(), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("progress_done", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("progress_total", sa.BigInteger(), nullable=False),
        sa.Column("result", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "(state = 'running') = (lease_expires_at IS NOT NULL) AND (state <> 'running' OR (worker_id IS NOT NULL AND started_at IS NOT NULL))",
            name=op.f("ck_job_units_lease_when_running"),
        ),
        sa.CheckConstraint(
            "0 <= progress_done AND progress_done <= progress_total", name=op.f("ck_job_units_progress_within_total")
        ),
        sa.CheckConstraint("attempt >= 0", name=op.f("ck_job_units_attempt_not_negative")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["selection_jobs.id"], name=op.f("fk_job_units_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_units")),
        sa.UniqueConstraint("job_id", "stage", "shard", name=op.f("uq_job_units_job_id_stage_shard")),
    )
    op.create_index(
        "ix_job_units_lease_expires_at",
        "job_units",
        ["lease_expires_at"],
        unique=False,
        postgresql_where="state = 'running'",
    )
    op.create_index(
        "ix_job_units_pending",
        "job_units",
        ["job_id", "stage", "shard"],
        unique=False,
        postgresql_where="state = 'pending'",
    )
    op.create_index(
        "uq_job_units_artifact_key_running",
        "job_units",
        ["artifact_key"],
        unique=True,
        postgresql_where="state = 'running'",
    )
    op.create_table(
        "provenance",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("weights_root", sa.LargeBinary(), nullable=False),
        sa.Column("record", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("length(weights_root) = 32", name=op.f("ck_provenance_weights_root_length")),
        sa.ForeignKeyConstraint(["job_id"], ["selection_jobs.id"], name=op.f("fk_provenance_job_id")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_provenance")),
    )
    op.create_table(
        "selected_samples",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("sample_index", sa.BigInteger(), nullable=False),
        sa.Column("sample_id", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=True),
        sa.Column("influence", sa.REAL(), nullable=False),
        sa.Column("weight", sa.REAL(), nullable=False),
        sa.Column("exact", sa.Boolean(), nullable=False),
        sa.CheckConstraint("rank >= 0", name=op.f("ck_selected_samples_rank_not_negative")),
        sa.CheckConstraint("weight >= 0", name=op.f("ck_selected_samples_weight_not_negative")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["selection_jobs.id"], name=op.f("fk_selected_samples_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "rank", name=op.f("pk_selected_samples")),
        sa.UniqueConstraint("job_id", "sample_index", name=op.f("uq_selected_samples_job_id_sample_index")),
    )
    op.create_table(
        "weight_chunks",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("chunk_no", sa.Integer(), nullable=False),
        sa.Column("influence", postgresql.ARRAY(sa.REAL()), nullable=False),
        sa.Column("weight", postgresql.ARRAY(sa.REAL()), nullable=False),
        sa.Column("exact", postgresql.ARRAY(sa.Boolean()), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint(
            "cardinality(influence) BETWEEN 1 AND 16384 AND cardinality(weight) = cardinality(influence) AND cardinality(exact) = cardinality(influence)",
            name=op.f("ck_weight_chunks_arrays_of_one_length"),
        ),
        sa.CheckConstraint("length(sha256) = 32", name=op.f("ck_weight_chunks_sha256_length")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["selection_jobs.id"], name=op.f("fk_weight_chunks_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "chunk_no", name=op.f("pk_weight_chunks")),
    )
    _hold_transitions("selection_jobs", "status", "queued", JOB_TRANSITIONS)
    _hold_transitions("job_units", "state", "pending", UNIT_TRANSITIONS)
    _notify_of_units()
    _freeze_provenance()
    _expand_weights()


def downgrade() -> None:
    op.execute("DROP VIEW sample_weights")
    for table in (
        "weight_chunks",
        "selected_samples",
        "provenance",
        "job_units",
        "job_results",
        "job_events",
        "selection_jobs",
        "datasets",
        "api_keys",
        "tenants",
    ):
        op.drop_table(table)
    for function in (
        "selection_jobs_hold_transitions",
        "job_units_hold_transitions",
        "job_units_notify",
        "provenance_refuse_change",
    ):
        op.execute(f"DROP FUNCTION {function}()")
    for kind in ("job_status", "stage", "unit_state"):
        op.execute(f"DROP TYPE {kind}")
