"""A store and a database to collect from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ledger_world import LedgerWorld, ledger_world
from support.retention_world import Kept, empty

from service.ids import new_id


@pytest.fixture(scope="module")
def _database(postgres_url: str) -> Iterator[LedgerWorld]:
    with ledger_world(postgres_url) as world:
        yield world


@pytest.fixture(autouse=True)
def _no_scratch_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's temporary folder is the test's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture(params=["folder", "remote"])
def kept(request: pytest.FixtureRequest, _database: LedgerWorld, tmp_path: Path) -> Kept:
    url = str(tmp_path / "store") if request.param == "folder" else f"memory://{new_id('store')}"
    return empty(_database, url)


@pytest.fixture
def local(_database: LedgerWorld, tmp_path: Path) -> Kept:
    return empty(_database, str(tmp_path / "store"))
