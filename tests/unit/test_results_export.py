"""Encoders of exports, and the response that streams them."""

import asyncio
import csv
import io
import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service import errors
from service.errors import Gone
from service.results.export import ResultStream
from service.results.formats import ByteStream, Columns, comma_separated, jsonl, parquet


def batches() -> Iterator[Columns]:
    for start in (0, 2):
        yield {
            "index": [start, start + 1],
            "id": [f"plain-{start}", 'a "quoted",\u2028 id'],
            "source": ["s", None],
            "influence": [0.1, -1e-45],
            "exact": [True, False],
            "rank": [None, 7],
        }


def rows() -> list[dict[str, object]]:
    return [dict(zip(batch, row, strict=True)) for batch in batches() for row in zip(*batch.values(), strict=True)]


def test_jsonl_is_one_object_a_line() -> None:
    parts = list(jsonl(batches()))
    assert len(parts) == 2
    assert [json.loads(line) for line in b"".join(parts).split(b"\n")[:-1]] == rows()


def test_csv_has_one_header_and_quotes() -> None:
    content = b"".join(comma_separated(batches())).decode()
    assert content.startswith("index,id,source,influence,exact,rank\r\n0,plain-0,s,0.1,true,\r\n")
    table = list(csv.reader(io.StringIO(content, newline="")))
    assert len(table) == 5
    assert table[2] == ["1", 'a "quoted",\u2028 id', "", "-1e-45", "false", "7"]


def test_parquet_yields_a_row_group_a_batch() -> None:
    parts = list(parquet(batches()))
    assert len(parts) == 3  # two row groups and the footer
    assert all(parts)
    file = pq.ParquetFile(io.BytesIO(b"".join(parts)))
    assert file.metadata.num_row_groups == 2
    table = file.read()
    assert table.schema.field("influence").type == pa.float32()
    assert table.drop_columns(["influence"]).to_pylist() == [
        {name: value for name, value in row.items() if name != "influence"} for row in rows()
    ]
    assert table["influence"].to_pylist() == pa.array([0.1, -1e-45] * 2, pa.float32()).to_pylist()


def test_parquet_holds_one_batch_at_a_time() -> None:
    made = 0

    def counted() -> Iterator[Columns]:
        nonlocal made
        for batch in batches():
            made += 1
            yield batch

    stream = parquet(counted())
    next(stream)
    assert made == 1
    stream.close()


def test_a_client_that_goes_away_closes_the_stream() -> None:
    closed: list[bool] = []

    def content() -> ByteStream:
        try:
            while True:
                yield b"x"
        finally:
            closed.append(True)

    async def receive() -> Message:
        return await asyncio.Future()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise OSError("the connection is closed")

    response = ResultStream(content(), media_type="text/plain")
    with pytest.raises(ClientDisconnect):
        asyncio.run(response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send))
    assert closed == [True]


def test_a_client_that_hangs_up_closes_the_stream() -> None:
    closed: list[bool] = []

    def content() -> ByteStream:
        try:
            while True:
                yield b"x"
        finally:
            closed.append(True)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.sleep(0)

    asyncio.run(ResultStream(content(), media_type="text/plain")({"type": "http"}, receive, send))
    assert closed == [True]


def test_what_fails_before_the_first_bytes_has_its_own_status() -> None:
    def content() -> ByteStream:
        raise Gone("It is gone.")
        yield b""

    app = FastAPI()
    errors.install(app)
    app.add_api_route("/", lambda: ResultStream(content(), media_type="text/plain"), response_model=None)
    answer = TestClient(app).get("/")
    assert (answer.status_code, answer.json()["code"]) == (410, "gone")
