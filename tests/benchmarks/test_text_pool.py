"""The small form of the benchmark of embeddings from text, and a second run that measures nothing again."""

from pathlib import Path
from typing import Any

import pytest
from support.small_form import run_script

OPTIONS = ("--rows", "300", "--length", "20", "--vocabulary", "500")


def run(folder: Path) -> dict[str, Any]:
    return run_script("text_embedding", folder, *OPTIONS)


@pytest.mark.slow
def test_every_row_is_embedded_and_a_second_run_measures_nothing(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert found["rows"] == 300
    assert found["embedding"]["tokens"] == found["generated"]["tokens"] > 4000
    assert found["embedding"]["width"] == 2 * 256 + 4
    assert found["embedding"]["peak_mib"] > 50
    assert run(tmp_path)["embedding"] == found["embedding"]
    assert "| embedding |" in (tmp_path / "out" / "text_embedding.md").read_text()
