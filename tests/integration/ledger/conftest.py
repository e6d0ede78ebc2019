"""An empty ledger in a database of its own; a lock that is waited for so long is an error, and no test that hangs."""

from collections.abc import Iterator

import pytest
from support.ledger_world import LedgerWorld, ledger_world


@pytest.fixture(scope="module")
def _database(postgres_url: str) -> Iterator[LedgerWorld]:
    with ledger_world(postgres_url, lock_timeout="20s") as made:
        yield made


@pytest.fixture
def world(_database: LedgerWorld) -> LedgerWorld:
    _database.empty()
    return _database
