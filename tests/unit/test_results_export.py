"""Encoders of exports, and the response that streams them."""

import asyncio
import csv
import io
import json
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
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
from service.results.formats import ENCODERS, ByteStream, batch_of, comma_separated, jsonl, parquet


def columns() -> Iterator[dict[str, list[Any]]]:
    for start in (0, 2):
        yield {
            "index": [start, start + 1],
            "id": [f"plain-{start}", 'a "quoted",\u2028 id'],
            "source": ["s", None],
            "influence": [0.1, -1e-45],
            "exact": [True, False],
            "rank": [None, 7],
        }


def batches() -> Iterator[pa.RecordBatch]:
    return map(batch_of, columns())


def rows() -> list[dict[str, object]]:
    return [dict(zip(batch, row, strict=True)) for batch in columns() for row in zip(*batch.values(), strict=True)]


AWKWARD = [
    "plain",
    "",
    "a,b",
    'q"q',
    "back\\slash",
    "line\nfeed",
    "cr\r",
    "\x01\x1f\x7f",
    "é\u2028\U0001f600",
    "=1+1",
    " s ",
]


def test_every_text_comes_back_from_lines_and_from_csv() -> None:
    batch = batch_of({"id": AWKWARD, "source": [None, *AWKWARD[1:]]})
    assert [json.loads(line)["id"] for line in b"".join(jsonl([batch])).split(b"\n")[:-1]] == AWKWARD
    text = b"".join(comma_separated([batch])).decode()
    assert [row[0] for row in csv.reader(io.StringIO(text, newline=""))][1:] == AWKWARD


def test_every_float_comes_back_and_stays_one() -> None:
    found = np.array([0, 1, -0.0, 1e20, 3.4e38, 1e-45, 123456.7, 1e-5, 1 / 3, -2.5, 16777216], np.float32)
    for parts in (jsonl([batch_of({"weight": found})]), comma_separated([batch_of({"weight": found})])):
        texts = [line.split(":")[-1].strip("}\r") for line in b"".join(parts).decode().split("\n")]
        texts = [text for text in texts if text not in ("", "weight")]
        np.testing.assert_array_equal(np.array(texts, np.float32), found)
        # A reader that guesses types from the first rows must not take them for integers.
        assert all(isinstance(json.loads(text), float) for text in texts)


def test_messages_in_lines() -> None:
    messages = [[{"role": "user", "content": 'é "\n'}], None]
    lines = b"".join(jsonl([batch_of({"index": [0, 1], "messages": messages})])).splitlines()
    assert [json.loads(line)["messages"] for line in lines] == messages


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


@pytest.mark.parametrize("encode", ENCODERS.values())
def test_a_stream_holds_one_batch_at_a_time(encode: Any) -> None:
    made: list[weakref.ref[pa.RecordBatch]] = []

    def counted() -> Iterator[pa.RecordBatch]:
        for start in range(5):
            batch = batch_of({"index": [start]})
            made.append(weakref.ref(batch))
            yield batch
            del batch

    stream = encode(counted())
    for part in stream:
        del part
        assert sum(batch() is not None for batch in made) <= 1
    assert len(made) == 5


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
