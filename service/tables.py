"""Every table in one import: what Alembic compares the database with, and what a process needs before it maps foreign keys."""

from service.audit import tables as audit
from service.auth import tables as auth
from service.datasets import tables as datasets
from service.db.engine import Base
from service.idempotency import tables as idempotency
from service.ledger import tables as ledger
from service.results import tables as results
from service.tasks import tables as tasks
from service.webhooks import tables as webhooks

__all__ = ["audit", "auth", "datasets", "idempotency", "ledger", "metadata", "results", "tasks", "webhooks"]

metadata = Base.metadata
