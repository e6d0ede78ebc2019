"""Alembic migrations of the service's database, in `versions/`; run by `winnow migrate`."""
