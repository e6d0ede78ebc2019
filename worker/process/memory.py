"""The memory that a process of the worker may use. Imports no torch."""

import contextlib
import os
import resource
from pathlib import Path


def hold_to(limit_bytes: int) -> None:
    """From the limit on an allocation fails, which ends the attempt; without one (0 or less) the kernel kills, this process
    before any other."""
    if limit_bytes > 0:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    with contextlib.suppress(OSError):  # not on Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text("500")


def usual_limit() -> int:
    """In bytes; the rest is for the supervisor and what the kernel keeps."""
    return available_memory() * 9 // 10


def available_memory() -> int:
    """Of the machine, or of the container where that has less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            found.append(int(Path(file).read_text()))
    return min(found)
