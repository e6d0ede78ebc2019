"""Datasets from memory: what is sent for a DataFrame, a `datasets.Dataset`, and rows one by one."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import httpx
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.scripted_server import Connect, Server

from winnow import in_memory

ROWS = [
    {"id": f"row-{i}", "messages": [{"role": "user", "content": "é\u2028"}, {"role": "assistant", "content": str(i)}]}
    for i in range(5)
]
TABLES: list[tuple[str, Callable[[], Any]]] = [
    ("pandas", lambda: pd.DataFrame(ROWS)),
    ("pandas, filtered", lambda: pd.DataFrame([{"id": "out", "messages": []}, *ROWS]).iloc[1:]),
    ("pandas, named index", lambda: pd.DataFrame(ROWS).set_index("id")),
    ("polars", lambda: pl.DataFrame(ROWS)),
    ("polars, lazy", lambda: pl.LazyFrame(ROWS).filter(pl.col("id") != "none")),
    ("datasets", lambda: datasets.Dataset.from_list(ROWS)),
    ("datasets, selected", lambda: datasets.Dataset.from_list([*ROWS[::-1]]).select([4, 3, 2, 1, 0])),
    ("pyarrow", lambda: pa.Table.from_pylist(ROWS)),
]


@pytest.mark.parametrize("make", [make for _, make in TABLES], ids=[name for name, _ in TABLES])
def test_columns_are_sent_as_parquet(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    monkeypatch.setattr(in_memory, "_BATCH_ROWS", 2)
    server = Server(httpx.ReadError("reset"), httpx.Response(201, json={"id": "ds_1"}))
    with connect(server) as winnow:
        assert winnow.upload_dataset(make(), "pool").id == "ds_1"
    first, second = (request.content for request in server.requests)
    assert first == second, "a second attempt sends the same"
    table = pq.read_table(io.BytesIO(second))
    assert sorted(table.schema.names) == ["id", "messages"]
    assert table.select(["id", "messages"]).to_pylist() == ROWS
    assert server.params[-1] == {"name": "pool"}


def generated() -> Iterator[dict[str, Any]]:
    yield from ROWS


@pytest.mark.parametrize(
    "make", [lambda: ROWS, lambda: tuple(ROWS), generated, lambda: datasets.IterableDataset.from_generator(generated)]
)
def test_rows_are_sent_as_lines(connect: Connect, make: Callable[[], Any]) -> None:
    server = Server(httpx.Response(201, json={"id": "ds_1"}))
    with connect(server) as winnow:
        winnow.upload_dataset(make(), "pool", on_bad_row="skip")
    lines = server.requests[0].content.decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == ROWS
    assert server.params == [{"name": "pool", "on_bad_row": "skip"}]


@pytest.mark.parametrize(
    ("source", "error", "what"),
    [
        ([{"text": "a"}, {"text": float("nan")}], ValueError, "row 2"),
        ([{"text": "a"}, {"text": {1, 2}}], TypeError, "row 2"),
        (["a"], TypeError, "row 1"),
        ([], ValueError, "no rows"),
        (pd.DataFrame({"text": []}), ValueError, "no rows"),
        ({"text": "a"}, TypeError, "dict is no dataset"),
        (3, TypeError, "int is no dataset"),
        (pl.DataFrame({"text": []}), ValueError, "no rows"),
    ],
)
def test_what_is_no_dataset_is_refused_before_anything_is_sent(
    connect: Connect, source: Any, error: type[Exception], what: str
) -> None:
    with connect(Server()) as winnow, pytest.raises(error, match=what):
        winnow.upload_dataset(source, "pool")


def test_rows_are_written_as_they_come() -> None:
    """No more than one row is held: each is a megabyte, and the process may have some tens of them."""
    program = """
import resource
from winnow.in_memory import as_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with as_file({"text": "a" * 2**20} for _ in range(300)) as path:
    print(path.stat().st_size > 300 * 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 * 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
