"""Damages files of a store, as a bad disk or a careless copy does."""

from pathlib import Path


def flip_second_half(path: Path) -> None:
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(byte ^ 255 for byte in content[half:]))


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
