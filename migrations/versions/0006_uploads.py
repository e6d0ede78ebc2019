"""Uploads that are sent in parts."""

from alembic import op

revision, down_revision = "0006", "0005"
branch_labels = depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE uploads (
            id varchar CONSTRAINT pk_uploads PRIMARY KEY,
            tenant_id varchar NOT NULL CONSTRAINT fk_uploads_tenant_id REFERENCES tenants (id),
            key_id varchar NOT NULL CONSTRAINT fk_uploads_key_id REFERENCES api_keys (id),
            sha256 varchar NOT NULL CONSTRAINT ck_uploads_sha256_is_hex CHECK (length(sha256) = 64),
            bytes bigint NOT NULL,
            part_bytes integer NOT NULL,
            received integer NOT NULL DEFAULT 0,
            rows_read bigint NOT NULL DEFAULT 0,
            read_until timestamptz,
            used_at timestamptz NOT NULL DEFAULT now(),
            created_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT ck_uploads_has_bytes CHECK (bytes > 0 AND part_bytes > 0)
        )
    """)
    op.execute("CREATE UNIQUE INDEX uq_uploads_key_id_sha256 ON uploads (key_id, sha256, bytes)")
    op.execute("CREATE INDEX ix_uploads_tenant_id_id ON uploads (tenant_id, id)")
    op.execute("CREATE INDEX ix_uploads_used_at ON uploads (used_at)")


def downgrade() -> None:
    op.execute("DROP TABLE uploads")
