"""A run of tests that is interrupted or killed leaves no process behind."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.processes import ROOT, having
from support.waiting import until

SECONDS = 30


@pytest.fixture
def folder() -> Iterator[Path]:
    """Outside this run's temporary folder: in one within it the path of PostgreSQL's socket would have more than 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="run-") as name:
        yield Path(name)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["interrupt", "kill"])
def test_nothing_outlives_a_run_that_ends_early(folder: Path, ending: str) -> None:
    """As `make test` is run: Ctrl-C reaches every process of the terminal's group, a kill only the first."""
    mark = ("PYTHON_ENDLESS_RUN", str(folder))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "1",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(folder / "temp"),
    ]
    with (folder / "log").open("wb") as log:
        run = subprocess.Popen(
            [*command, str(Path(__file__).with_name("endless_run.py"))],
            cwd=ROOT,
            # The folder of this run's PostgreSQL is not that one's.
            env={**{name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}, mark[0]: mark[1]},
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # it may be ignored where tests run unattended
        )
    try:
        until("it computes", lambda: (folder / "ready").exists() or run.poll() is not None)
        commands = [" ".join(psutil.Process(pid).cmdline()) for pid in having(*mark)]
        for part in ("celery", "worker.process.main", "postgres", "valkey-server"):
            assert any(part in command for command in commands), (part, commands, (folder / "log").read_text())
        if ending == "interrupt":
            os.killpg(run.pid, signal.SIGINT)
        else:
            run.kill()
        until("the run has ended", lambda: run.poll() is not None)
        until("all that it started has ended", lambda: not having(*mark), SECONDS)
    finally:
        for pid in having(*mark):
            os.kill(pid, signal.SIGKILL)
        run.wait()
