"""No process outlives the tests that started it, however they end: on Ctrl-C, or killed.

Servers and workers run in sessions of their own, where no signal of the terminal reaches them, and pytest-xdist ends its
processes without a teardown. So the first pytest process starts this file as a program: it waits until its standard input
closes, which happens however that process ends, and ends every process that has the run's mark in its environment.

    python reaper.py MARK
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid

import psutil

MARK = "PYTHON_WINNOW_TEST_RUN"  # the compute process inherits PYTHON* only
_GRACE_SECONDS = 3.0  # servers tidy up what is shared on the machine


class Reaper:
    """Of the run of this process; from now on everything that is started has its mark."""

    def __init__(self) -> None:
        mark = uuid.uuid4().hex
        # Without the mark of a run that this one is a test of: it would be ended with that, before it has ended its own.
        environment = {name: value for name, value in os.environ.items() if name != MARK}
        command = [sys.executable, __file__, mark]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
        os.environ[MARK] = mark

    def reap(self) -> None:
        """Begins at once, and does not wait."""
        assert self._process.stdin is not None
        self._process.stdin.close()


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _end_all(mark: str) -> None:
    """SIGTERM, and SIGKILL to whom that does not end, until none is left: one may have started another meanwhile."""
    deadline = time.monotonic() + _GRACE_SECONDS
    asked: set[psutil.Process] = set()
    while left := _marked(mark):
        for process in left:
            with contextlib.suppress(psutil.Error):
                if time.monotonic() > deadline:
                    process.kill()
                elif process not in asked:
                    process.terminate()
                    asked.add(process)
        time.sleep(0.1)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    _end_all(sys.argv[1])
