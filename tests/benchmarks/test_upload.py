"""The small form of the upload benchmark: the same rows from every container, and no line measured twice."""

from pathlib import Path
from typing import Any

import pytest
from support.small_form import run_script


def run(folder: Path) -> dict[str, Any]:
    return run_script("upload", folder, "--rows", "300")


@pytest.mark.slow
def test_every_container_has_the_rows_and_a_second_run_measures_nothing(tmp_path: Path) -> None:
    found = run(tmp_path)
    lines = found["now"]
    assert len(lines) == 7
    assert {line["rows"] for line in lines} == {300}
    assert len({line["fingerprint"] for line in lines}) == 1, "messages and prompts say the same"
    assert all(line["processor_seconds"] >= 0 and line["api_peak_mib"] > 50 for line in lines)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(kept) == 7
    assert run(tmp_path)["now"] == lines
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == kept
    assert "messages.jsonl, in parts" in (tmp_path / "out" / "upload.md").read_text()
