"""Shared by the benchmarks: the memory of a running stack, an API to measure, and the machine and commit of a result."""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from service.local.process_group import free_port, parts
from winnow.stack import Stack

READY_SECONDS = 60


class MemoryWatch:
    """Samples the resident memory of the stack's processes twice a second and keeps the peak of each."""

    def __init__(self, stack: Stack) -> None:
        self.peaks: dict[str, int] = {}
        self._names = {process.pid: name for name, process in parts(stack.home).items()}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(0.5):
            for pid, name in self._names.items():
                try:
                    process = psutil.Process(pid)
                    self._note(name, process)
                    for child in process.children(recursive=True) if name.startswith("worker") else []:
                        self._note(f"{name} compute", child)
                except psutil.Error:
                    continue  # the process has ended or was killed; its peak so far is kept

    def _note(self, name: str, process: psutil.Process) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0), process.memory_info().rss)

    def stop(self) -> dict[str, int]:
        self._stopping.set()
        self._thread.join()
        return {name: peak >> 20 for name, peak in sorted(self.peaks.items())}


@contextmanager
def serve_api(
    code: Path, settings: dict[str, str], log: Path, workers: int = 1, *, minimal: bool = False
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL and the process of the API of a checkout, run by uvicorn with these settings alone; or of `minimal_api`."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
    command += ["--workers", str(workers)] if workers > 1 else []
    if minimal:
        command += [
            "--app-dir",
            str(Path(__file__).parent),
            "minimal_api:app",
            "--http",
            "httptools",
            "--loop",
            "uvloop",
        ]
    else:
        command += ["service.app:create_app", "--factory", *_served_as(code)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WINNOW_")}
    environment = {**inherited, "PYTHONPATH": str(code), **settings}
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=code, env=environment, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, log)
        yield url, process
    finally:
        process.terminate()
        process.wait()


def _served_as(code: Path) -> list[str]:
    """How the checkout serves itself: without uvloop where it does not depend on it, though it is installed here."""
    own = (code / "service" / "http" / "protocol.py").exists()
    http = ["--http", "service.http.protocol:TimedHeads" if own else "h11"]
    return http if "uvloop" in (code / "pyproject.toml").read_text() else [*http, "--loop", "asyncio"]


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/healthz").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"the API did not start; see {log}")


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "torch": torch.__version__,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def commit() -> str:
    """The abbreviated hash of the commit that is checked out, marked `-dirty` if files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def heading(options: argparse.Namespace) -> dict[str, Any]:
    """The origin of a result: command, commit, machine. Folders appear as the name of their option, not as a path."""
    hidden = {str(value): name.upper() for name, value in vars(options).items() if isinstance(value, Path)}
    words = [hidden.get(word, word) for word in sys.argv[1:]]
    kept = [word for word, before in zip(words, ["", *words], strict=False) if "--beside" not in (word, before)]
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept]),
        "commit": commit(),
        "machine": machine(),
        "beside": options.beside,
        **({"seed": options.seed} if "seed" in options else {}),
    }
