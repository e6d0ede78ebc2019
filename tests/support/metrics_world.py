"""How tests read metrics, and the service that they read them of."""

from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.settings import (
    ApiSettings,
    LedgerSettings,
)
from support.ledger_world import LedgerWorld
from support.world import make_settings

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


def settings_of(world: LedgerWorld, broker_url: str, folder: Path) -> ApiSettings:
    ledger = LedgerSettings(sweep_seconds=0.2, cancel_seconds=0.1)
    groups = {"artifacts": {"url": str(folder)}, "models": {"folder": folder}, "ledger": ledger}
    return make_settings(world.url, folder, broker_url=broker_url, **groups)
