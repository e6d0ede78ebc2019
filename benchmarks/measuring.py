"""What the benchmarks share: the memory of a running stack, the machine and the commit that a figure belongs to."""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import torch

from service.local import Stack


class MemoryWatch:
    """Samples the resident memory of the stack's processes twice a second and keeps the peak of each."""

    def __init__(self, stack: Stack) -> None:
        self.peaks: dict[str, int] = {}
        self._names = {pid: name for name, pid in stack.pids.items()}
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
                    continue  # a process that ended, or was killed, has left its peak

    def _note(self, name: str, process: psutil.Process) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0), process.memory_info().rss)

    def stop(self) -> dict[str, int]:
        self._stopping.set()
        self._thread.join()
        return {name: peak >> 20 for name, peak in sorted(self.peaks.items())}


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
    """The short name of the commit that is checked out, with a mark where files differ from it."""
    told = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return told.stdout.strip()


def heading(options: argparse.Namespace) -> dict[str, Any]:
    """What a result says of itself; folders are named by their option, not by their path."""
    hidden = {str(value): name.upper() for name, value in vars(options).items() if isinstance(value, Path)}
    words = [hidden.get(word, word) for word in sys.argv[1:]]
    kept = [word for word, before in zip(words, ["", *words], strict=False) if "--beside" not in (word, before)]
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept]),
        "commit": commit(),
        "machine": machine(),
        "beside": options.beside,
        "seed": options.seed,
    }
