"""A checkout's examples beside a stack with a tiny model, for what the documents and examples say to type."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.doc_blocks import MODEL, ROOT
from support.tiny import pool_rows, write_jsonl

from service.local.stack import StackProcess


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Path]:
    """A checkout's examples, half of the pool, and a stack that runs from its .winnow."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "examples").mkdir()
    for name in ("target.jsonl", "train_trl.py", "select_and_train.ipynb"):
        shutil.copy(ROOT / "examples" / name, folder / "examples")
    rows = [row for row in pool_rows(300) if len(row["messages"]) == 2]  # what every preset of an export can hold
    write_jsonl(folder / "examples" / "pool.jsonl", rows)
    shutil.copytree(tiny_llama, folder / ".winnow" / "models" / MODEL)
    process = StackProcess(folder / ".winnow", port=0, workers=1)
    try:
        process.wait_ready()
        yield folder
    finally:
        process.stop()
