"""Log lines that a thread writes: all of them, in order, and nobody waits for whoever reads them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = """
import logging, sys, time
from service.observability import logs
from service.settings import LogSettings
logs.configure(LogSettings(), in_thread=True, service="api")
log = logging.getLogger("test")
"""


def started(program: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", START + program]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise RuntimeError('at the end')"])
def test_all_lines_are_there_in_order_when_the_process_ends(end: str) -> None:
    with started(f"for i in range(25_000): log.info('line %d', i)\n{end}") as process:
        _, err = process.communicate(timeout=120)
    lines = [line.rpartition(": line ")[2] for line in err.splitlines() if "test: line " in line]
    assert lines == [str(i) for i in range(25_000)]
    assert ("at the end" in err) == ("at the end" in end)


def test_nobody_waits_for_a_reader_that_does_not_read() -> None:
    """Far more than a pipe holds: a plain handler would wait for ever."""
    with started("for i in range(5_000): log.info('x' * 200)\nprint('done', flush=True)") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        _, err = process.communicate(timeout=120)
    assert err.count("x" * 200) == 5_000


def test_an_error_is_written_before_its_call_returns() -> None:
    with started("log.info('first')\nlog.error('last')\nimport os; os._exit(0)") as process:
        _, err = process.communicate(timeout=120)
    assert [line.rpartition(": ")[2] for line in err.splitlines()] == ["first", "last"]
