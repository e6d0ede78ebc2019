"""A disk of its own, which can be filled."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_BALLAST = "ballast"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """`folder` on a disk of this size, with the files that it has (the mark of a store), but no folder of it."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    folder.mkdir(exist_ok=True)
    kept = {path: path.read_bytes() for path in folder.glob("*") if path.is_file()}
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    try:
        for path, content in kept.items():
            path.write_bytes(content)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """To the last byte."""
    ballast = os.open(folder / _BALLAST, os.O_CREAT | os.O_WRONLY)
    try:
        for size in (2**16, 1):
            while _wrote(ballast, size):
                pass
    finally:
        os.close(ballast)


def _wrote(file: int, size: int) -> bool:
    try:
        return os.write(file, bytes(size)) > 0
    except OSError:
        return False


def free(folder: Path) -> None:
    (folder / _BALLAST).unlink(missing_ok=True)
