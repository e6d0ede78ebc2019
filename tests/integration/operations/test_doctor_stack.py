"""`winnow doctor` of a local stack, found by its folder."""

from pathlib import Path

import pytest
from support.ledger_world import wait_until
from typer.testing import CliRunner

from service.local import doctor
from service.local.stack import StackProcess
from winnow.cli.main import app


@pytest.mark.slow
def test_it_looks_at_a_running_stack(tmp_path: Path) -> None:
    runner = CliRunner()
    none = runner.invoke(app, ["doctor", "--home", str(tmp_path / "home")])
    assert (none.exit_code, "FAIL     settings: no stack is running from" in none.stdout) == (1, True)
    process = StackProcess(tmp_path / "home", port=0, workers=1)
    try:
        process.wait_ready()
        wait_until(lambda: "alive, version" in str(doctor.examine(tmp_path / "home")), 120, "its worker is there")
        assert {f.level for f in doctor.examine(tmp_path / "home") if f.name != "disk"} == {"ok"}
    finally:
        process.stop()
