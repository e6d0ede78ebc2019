"""Alembic's environment: online only, one transaction for all pending migrations, the URL given by the caller."""

import os

from alembic import context
from sqlalchemy import create_engine, pool

from service.schema import metadata
from service.settings import DatabaseSettings

# `winnow migrate` passes the URL; Alembic's own command line takes it from the environment.
settings = DatabaseSettings(url=context.config.attributes.get("url") or os.environ["WINNOW_DATABASE__URL"])

engine = create_engine(settings.url, poolclass=pool.NullPool)
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=metadata, compare_type=True, compare_server_default=True)
    with context.begin_transaction():
        context.run_migrations()
