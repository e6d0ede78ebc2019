"""What users sent is for the service's own user alone, whatever the umask."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.storage.artifacts import ArtifactStore


@pytest.fixture(autouse=True)
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_folders_and_files_of_a_store_are_private(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "new" / "store"))
    key = f"embed/ab/{'ab' * 32}"
    store.write_json(key, {"a": 1})
    store.write_json(f"{key}.json", {"a": 1})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_dir()}
    assert modes == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()} == {0o600}
    assert store.read_json(key) == {"a": 1}
