"""How tests read metrics, and the service that they read them of."""

from pathlib import Path

from conftest import SECRET
from ledger_world import LedgerWorld
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import text

from service.settings import (
    ApiSettings,
    ArtifactSettings,
    BrokerSettings,
    DatabaseSettings,
    LedgerSettings,
    ModelSettings,
    WorkerSettings,
)

SOON = 60.0

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(exposition: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((f"winnow_{name}", frozenset(labels.items())))


def read(registry: CollectorRegistry) -> Samples:
    return samples(generate_latest(registry).decode())


def emptied(world: LedgerWorld) -> LedgerWorld:
    """Without jobs and without workers."""
    world.empty()
    with world.engine.begin() as connection:
        connection.execute(text("DELETE FROM worker_processes"))
    return world


def settings_of(world: LedgerWorld, broker_url: str, folder: Path) -> ApiSettings:
    return ApiSettings(
        database=DatabaseSettings(url=world.url, pool_size=2),
        broker=BrokerSettings(url=broker_url),
        artifacts=ArtifactSettings(url=str(folder)),
        models=ModelSettings(folder=folder),
        ledger=LedgerSettings(sweep_seconds=0.2, cancel_seconds=0.1),
        worker=WorkerSettings(device="cpu", threads=1),
        secret_key=SecretStr(SECRET),
    )
