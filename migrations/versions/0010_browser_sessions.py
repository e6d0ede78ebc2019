"""Sessions of browsers, and links that log in once."""

from alembic import op

revision, down_revision = "0010", "0009"
branch_labels = depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE browser_sessions (
            digest bytea CONSTRAINT pk_browser_sessions PRIMARY KEY,
            key_id varchar NOT NULL CONSTRAINT fk_browser_sessions_key_id REFERENCES api_keys,
            expires_at timestamptz NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT ck_browser_sessions_digest_is_sha256 CHECK (length(digest) = 32)
        );
        CREATE INDEX ix_browser_sessions_key_id_created_at ON browser_sessions (key_id, created_at);
        CREATE INDEX ix_browser_sessions_expires_at ON browser_sessions (expires_at);
        CREATE TABLE login_links (
            digest bytea CONSTRAINT pk_login_links PRIMARY KEY,
            key_id varchar NOT NULL CONSTRAINT fk_login_links_key_id REFERENCES api_keys,
            expires_at timestamptz NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT ck_login_links_digest_is_sha256 CHECK (length(digest) = 32)
        );
        CREATE INDEX ix_login_links_key_id ON login_links (key_id);
        CREATE INDEX ix_login_links_expires_at ON login_links (expires_at);
    """)


def downgrade() -> None:
    op.execute("DROP TABLE login_links, browser_sessions")
