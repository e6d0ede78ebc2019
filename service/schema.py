"""Every table, in one import: what Alembic compares the database with, and the migrations' entry point."""

from pathlib import Path

from alembic import command
from alembic.config import Config

from service.database import Base
from service.datasets import tables as datasets
from service.jobs import tables as jobs
from service.results import tables as results
from service.tenants import tables as tenants

__all__ = ["alembic_config", "datasets", "jobs", "metadata", "results", "tenants", "upgrade"]

metadata = Base.metadata


def alembic_config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent.parent / "migrations"))
    config.attributes["url"] = url
    return config


def upgrade(url: str, revision: str = "head") -> None:
    """Brings the database to the revision."""
    command.upgrade(alembic_config(url), revision)
