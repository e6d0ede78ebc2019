"""The API contract: scopes and limits of keys, idempotency, webhooks, the audit log, fair turns; provenance refuses TRUNCATE too.

Only adds, so that API and workers of the version before go on working on the new schema. New tables come first, since the trigger on
events writes them. After that each statement locks one table that is in use, in a transaction of its own, and may be run again.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_JSON = postgresql.JSONB(astext_type=sa.Text())


def _time(name: str, *, nullable: bool = True) -> "sa.Column[object]":
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _created_at() -> "sa.Column[object]":
    return sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False)


def _create_idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("request_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("headers", _JSON, nullable=False),
        sa.Column("sealed_body", sa.LargeBinary(), nullable=False),
        _created_at(),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_idempotency_keys_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", "key", name=op.f("pk_idempotency_keys")),
        if_not_exists=True,
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"], if_not_exists=True)


def _create_webhooks() -> None:
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("events", postgresql.ARRAY(sa.String()), nullable=False),
        sa.Column("sealed_secret", sa.LargeBinary(), nullable=False),
        sa.Column("sealed_previous_secret", sa.LargeBinary(), nullable=True),
        _time("previous_secret_until"),
        _time("disabled_at"),
        sa.Column("disabled_reason", sa.String(), nullable=True),
        _time("deleted_at"),
        _created_at(),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_webhook_endpoints_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_endpoints")),
        if_not_exists=True,
    )
    op.create_index("ix_webhook_endpoints_tenant_id_id", "webhook_endpoints", ["tenant_id", "id"], if_not_exists=True)
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("endpoint_id", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("payload", sa.String(), nullable=False),
        sa.Column("state", sa.String(), server_default="pending", nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        _time("next_attempt_at"),
        _time("finished_at"),
        _created_at(),
        sa.CheckConstraint(
            "state::text IN ('pending', 'delivered', 'failed')", name=op.f("ck_webhook_deliveries_state_known")
        ),
        sa.CheckConstraint(
            "(state = 'pending') = (next_attempt_at IS NOT NULL)", name=op.f("ck_webhook_deliveries_due_when_pending")
        ),
        sa.ForeignKeyConstraint(
            ["endpoint_id"], ["webhook_endpoints.id"], name=op.f("fk_webhook_deliveries_endpoint_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_deliveries")),
        if_not_exists=True,
    )
    op.create_index(
        "ix_webhook_deliveries_endpoint_id_id", "webhook_deliveries", ["endpoint_id", "id"], if_not_exists=True
    )
    op.create_index(
        "ix_webhook_deliveries_endpoint_id_state_id",
        "webhook_deliveries",
        ["endpoint_id", "state", "id"],
        if_not_exists=True,
    )
    op.create_index(
        "ix_webhook_deliveries_due",
        "webhook_deliveries",
        ["endpoint_id", "next_attempt_at"],
        postgresql_where="state = 'pending'",
        if_not_exists=True,
    )
    op.create_table(
        "webhook_attempts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("delivery_id", sa.String(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("seconds", sa.REAL(), nullable=False),
        sa.Column("error", sa.String(), nullable=True),
        _created_at(),
        sa.ForeignKeyConstraint(
            ["delivery_id"],
            ["webhook_deliveries.id"],
            name=op.f("fk_webhook_attempts_delivery_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_attempts")),
        if_not_exists=True,
    )
    op.create_index("ix_webhook_attempts_delivery_id_id", "webhook_attempts", ["delivery_id", "id"], if_not_exists=True)


def _create_audit_log() -> None:
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=True),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("object_id", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.Column("detail", _JSON, nullable=False),
        _created_at(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
        if_not_exists=True,
    )
    op.create_index("ix_audit_log_tenant_id_id", "audit_log", ["tenant_id", "id"], if_not_exists=True)
    op.create_index(
        "ix_audit_log_tenant_id_object_id_id", "audit_log", ["tenant_id", "object_id", "id"], if_not_exists=True
    )


# What is refused to every role; only who may alter the table can go round it.
_REFUSE_CHANGE = """
    CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
    END $$
"""

# In the transaction of what happened: who waits for the job is told, and the webhooks get their deliveries. Not in the worker's
# code, since a worker of the version before would not do it.
_TELL_OF_EVENTS = """
    CREATE OR REPLACE FUNCTION job_events_tell() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE
        what text := CASE
            WHEN NEW.type IN ('job.running', 'job.succeeded', 'job.failed', 'job.cancelled')
                THEN 'selection_job.' || substr(NEW.type, 5)
            WHEN NEW.type = 'stages.started' THEN 'selection_job.phase'
        END;
    BEGIN
        PERFORM pg_notify('winnow_events', NEW.job_id);
        IF what IS NOT NULL THEN
            INSERT INTO webhook_deliveries (id, endpoint_id, job_id, type, payload, next_attempt_at)
            SELECT 'msg_' || lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0')
                    || left(replace(gen_random_uuid()::text, '-', ''), 20),
                e.id, NEW.job_id, what,
                jsonb_build_object(
                    'type', what,
                    'timestamp', to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
                    'data', jsonb_strip_nulls(jsonb_build_object(
                        'object', 'selection_job', 'id', NEW.job_id,
                        'status', CASE what WHEN 'selection_job.phase' THEN 'running' ELSE substr(NEW.type, 5) END,
                        'stages', NEW.data -> 'stages', 'error', NEW.data -> 'error', 'metadata', j.job_metadata))
                )::text,
                clock_timestamp()
            FROM selection_jobs j JOIN webhook_endpoints e ON e.tenant_id = j.tenant_id
            WHERE j.id = NEW.job_id AND e.disabled_at IS NULL AND e.deleted_at IS NULL AND what = ANY (e.events);
            IF FOUND THEN
                PERFORM pg_notify('winnow_webhooks', '');
            END IF;
        END IF;
        RETURN NULL;
    END $$
"""


def _alter_tables_in_use() -> None:
    for statement in (
        "ALTER TABLE tenants ADD COLUMN IF NOT EXISTS turn_started_at timestamptz",
        "ALTER TABLE api_keys ADD COLUMN IF NOT EXISTS scopes varchar[] NOT NULL DEFAULT '{read,submit}',"
        " ADD COLUMN IF NOT EXISTS expires_at timestamptz, ADD COLUMN IF NOT EXISTS last_used_at timestamptz,"
        " ADD COLUMN IF NOT EXISTS limits jsonb NOT NULL DEFAULT '{}',"
        " DROP CONSTRAINT IF EXISTS ck_api_keys_scopes_known, ADD CONSTRAINT ck_api_keys_scopes_known"
        " CHECK (scopes <@ ARRAY['read', 'submit', 'admin']::varchar[])",
        "ALTER TABLE datasets ADD COLUMN IF NOT EXISTS key_id varchar"
        " CONSTRAINT fk_datasets_key_id REFERENCES api_keys (id)",
        "ALTER TABLE selection_jobs"
        " ADD COLUMN IF NOT EXISTS retry_of varchar CONSTRAINT fk_selection_jobs_retry_of REFERENCES selection_jobs (id),"
        " ADD COLUMN IF NOT EXISTS reproduces varchar"
        " CONSTRAINT fk_selection_jobs_reproduces REFERENCES selection_jobs (id)",
        "DROP INDEX CONCURRENTLY IF EXISTS ix_selection_jobs_key_id_created_at",
        "CREATE INDEX CONCURRENTLY ix_selection_jobs_key_id_created_at ON selection_jobs (key_id, created_at)",
        "DROP INDEX CONCURRENTLY IF EXISTS ix_selection_jobs_open_of_tenant",
        "CREATE INDEX CONCURRENTLY ix_selection_jobs_open_of_tenant ON selection_jobs (tenant_id, created_at, id)"
        " WHERE status IN ('queued', 'running', 'cancelling')",
        "DROP INDEX CONCURRENTLY IF EXISTS ix_selection_jobs_live_by_status",
        "CREATE INDEX CONCURRENTLY ix_selection_jobs_live_by_status ON selection_jobs (tenant_id, status, id)"
        " WHERE deleted_at IS NULL",
        "DROP INDEX CONCURRENTLY IF EXISTS ix_datasets_key_id",
        "CREATE INDEX CONCURRENTLY ix_datasets_key_id ON datasets (key_id) WHERE deleted_at IS NULL",
        _REFUSE_CHANGE,
        "CREATE OR REPLACE TRIGGER provenance_refuse_truncate BEFORE TRUNCATE ON provenance"
        " FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()",
        "CREATE OR REPLACE TRIGGER audit_log_refuse_change BEFORE UPDATE OR DELETE ON audit_log"
        " FOR EACH ROW EXECUTE FUNCTION refuse_change()",
        "CREATE OR REPLACE TRIGGER audit_log_refuse_truncate BEFORE TRUNCATE ON audit_log"
        " FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()",
        _TELL_OF_EVENTS,
        "CREATE OR REPLACE TRIGGER job_events_tell AFTER INSERT ON job_events"
        " FOR EACH ROW EXECUTE FUNCTION job_events_tell()",
    ):
        op.execute(statement)


def upgrade() -> None:
    _create_idempotency_keys()
    _create_webhooks()
    _create_audit_log()
    with op.get_context().autocommit_block():
        _alter_tables_in_use()


def downgrade() -> None:
    op.execute("DROP TRIGGER job_events_tell ON job_events")
    op.execute("DROP TRIGGER provenance_refuse_truncate ON provenance")
    for table in ("audit_log", "webhook_attempts", "webhook_deliveries", "webhook_endpoints", "idempotency_keys"):
        op.drop_table(table)
    for function in ("job_events_tell", "refuse_change"):
        op.execute(f"DROP FUNCTION {function}()")
    op.drop_index("ix_datasets_key_id", "datasets")
    op.drop_index("ix_selection_jobs_key_id_created_at", "selection_jobs")
    op.drop_index("ix_selection_jobs_open_of_tenant", "selection_jobs")
    op.drop_index("ix_selection_jobs_live_by_status", "selection_jobs")
    op.drop_column("selection_jobs", "reproduces")
    op.drop_column("selection_jobs", "retry_of")
    op.drop_column("datasets", "key_id")
    op.drop_constraint("ck_api_keys_scopes_known", "api_keys")
    for column in ("limits", "last_used_at", "expires_at", "scopes"):
        op.drop_column("api_keys", column)
    op.drop_column("tenants", "turn_started_at")
