"""Alembic's environment: online only, one transaction for each migration, under the lock that lets one run at a time."""

from contextlib import nullcontext

from alembic import context

from service.db.migrate import migrating
from service.settings import database_settings
from service.tables import metadata

given = context.config.attributes
# `upgrade` passes its connection, other callers the URL; Alembic's own command line takes it from the settings.
opened = (
    nullcontext(given["connection"])
    if "connection" in given
    else migrating(given.get("url") or database_settings().url)
)
with opened as connection:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        compare_type=True,
        compare_server_default=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()
