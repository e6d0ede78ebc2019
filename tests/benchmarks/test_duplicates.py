"""The small form of the benchmark of repeats, and a second run that measures nothing again."""

from pathlib import Path
from typing import Any

import pytest
from support.small_form import run_script

OPTIONS = ("--rows", "6000", "--length", "60", "--target", "40")


def run(folder: Path) -> dict[str, Any]:
    return run_script("duplicates", folder, *OPTIONS)


@pytest.mark.slow
def test_what_is_planted_is_found_and_a_second_run_measures_nothing(tmp_path: Path) -> None:
    found = run(tmp_path)
    search = found["search"]
    for kind in ("duplicates", "overlap"):
        assert search[kind]["planted"] > 0
        assert search[kind]["found"]["exact"] == 1
        assert search[kind]["not_planted"] == 0
    assert search["duplicates"]["found"]["near"] > 0.9
    assert found["signatures"]["shards"] >= 1
    assert search["peak_mib"] > 50
    assert run(tmp_path)["search"] == search
    assert "| search |" in (tmp_path / "out" / "duplicates.md").read_text()
