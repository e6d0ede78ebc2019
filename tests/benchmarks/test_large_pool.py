"""The small form of the benchmark of a large pool: two workers share it, the next job finds it, and a rerun measures nothing."""

from pathlib import Path

import pytest
from support.small_form import Run

OPTIONS = ("--rows", "4000", "--max-length", "64")


@pytest.mark.slow
def test_a_pool_is_prepared_once(run_benchmark: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "default")  # else a stack of root's does not start: Celery warns of that
    found = run_benchmark("large_pool", *OPTIONS)
    first, again = found["first found"], found["again found"]
    assert found["row_count"] == first["tokens"]["samples"] == 4000
    assert first["prepare_units"] > 3
    assert again["prepare_units"] == 1
    assert [stage["stage"] for stage in first["stages"]] == ["prepare", "select"]
    assert again["tokens"] == first["tokens"]
    assert {"tokens", "datasets", "selections"} < found["stored_bytes"].keys()
    assert found["stored_bytes"]["counts of the pool's rows"] < found["stored_bytes"]["tokens"] / 5
    assert {"worker1 compute", "api"} < found["peak_memory_mib"].keys()
    assert run_benchmark("large_pool", *OPTIONS)["first found"] == first
    assert "prepare" in (tmp_path / "out" / "large_pool.md").read_text()
