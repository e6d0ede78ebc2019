"""Encoders of exports, and the response that streams them."""

import asyncio
import csv
import io
import json
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect
from starlette.types import Message

from service.datasets.storage import Sample
from service.http import errors
from service.http.downloads import Download
from service.http.errors import Gone
from service.results.content import Layout
from service.results.formats import ENCODERS, ByteStream, Format, batch_of, comma_separated, jsonl, parquet
from service.settings import ShareSettings
from service.shares import Shares


def streamed(content: ByteStream) -> Download:
    shares = Shares(ShareSettings(), connections=1)
    return Download(shares, "tenant", content, check=lambda: None, media_type="text/plain")


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
    *("plain", "", "a,b", 'q"q', "back\\slash", "line\nfeed", "cr\r"),
    *("\x01\x1f\x7f", "é\u2028\U0001f600", "=1+1", " s "),
]


def test_every_text_comes_back_from_lines_and_from_csv() -> None:
    batch = batch_of({"id": AWKWARD, "source": [None, *AWKWARD[1:]]})
    assert [json.loads(line)["id"] for line in b"".join(jsonl([batch])).split(b"\n")[:-1]] == AWKWARD
    text = b"".join(comma_separated([batch], escape_formulas=False)).decode()
    assert [row[0] for row in csv.reader(io.StringIO(text, newline=""))][1:] == AWKWARD


FORMULAS = [
    "=1+1",
    "=cmd|' /C calc'!A0",
    "+1+cmd",
    "-1+cmd",
    "@SUM(A1)",
    "\tx",
    "\rx",
    "\nx",
    "\uff1d1",
    '=x,"y"',
    "'=x",
    "'-1",
    "--",
]
HARMLESS = ["-1", "+1.5e-3", "-.5", "a=b", "'", "'quoted'", "", "1=1", " =1"]


def test_a_text_that_a_spreadsheet_would_calculate_is_escaped_and_nothing_else() -> None:
    batch = batch_of({"id": FORMULAS + HARMLESS, "influence": [-1.5] * len(FORMULAS + HARMLESS)})
    text = b"".join(comma_separated([batch])).decode()
    rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
    assert [row[0] for row in rows] == [f"'{formula}" for formula in FORMULAS] + HARMLESS
    assert {row[1] for row in rows} == {"-1.5"}


def test_every_float_comes_back_and_stays_one() -> None:
    found = np.array([0, 1, -0.0, 1e20, 3.4e38, 1e-45, 123456.7, 1e-5, 1 / 3, -2.5, 16777216], np.float32)
    for parts in (jsonl([batch_of({"weight": found})]), comma_separated([batch_of({"weight": found})])):
        texts = [line.split(":")[-1].strip("}\r") for line in b"".join(parts).decode().split("\n")]
        texts = [text for text in texts if text not in ("", "weight")]
        np.testing.assert_array_equal(np.array(texts, np.float32), found)
        # A reader that guesses types from the first rows must not take them for integers.
        assert all(isinstance(json.loads(text), float) for text in texts)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}
SAMPLES = [
    Sample(
        0,
        "0",
        None,
        [{"role": "user", "content": 'é "\n'}, {"content": "", "role": "assistant", "counts": False}],
        None,
    ),
    Sample(1, "1", None, None, "a,b\r\nc"),
    Sample(2, "2", None, [{"role": "assistant", "content": "", "tool_calls": [CALL]}], None, [{"type": "function"}]),
]
LAYOUT = Layout(("messages", "tools", "text"), ("tool_calls", "counts"))


@pytest.mark.parametrize("format", Format)
def test_content_comes_back_from_every_format(format: Format) -> None:
    batch = batch_of({"index": [0, 1, 2], **LAYOUT.content(SAMPLES, format)})
    file = b"".join(ENCODERS[format]([batch]))
    wanted = {name: [getattr(sample, name) for sample in SAMPLES] for name in LAYOUT.columns}
    if format is Format.JSONL:
        lines = [json.loads(line) for line in file.splitlines()]
        assert {name: [line[name] for line in lines] for name in wanted} == wanted
    elif format is Format.CSV:
        rows = list(csv.DictReader(io.StringIO(file.decode(), newline="")))
        for name in ("messages", "tools"):
            assert [json.loads(row[name] or "null") for row in rows] == wanted[name]
        assert [row["text"] or None for row in rows] == wanted["text"]
    else:
        table = pq.read_table(io.BytesIO(file))
        assert [value and json.loads(value) for value in table["tools"].to_pylist()] == wanted["tools"]
        (_, reply), _, (called,) = table["messages"].to_pylist()
        assert reply == {"role": "assistant", "content": "", "tool_calls": None, "counts": False}
        (call,) = called["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == CALL["function"]["arguments"]  # type: ignore[index]
        assert table["text"].to_pylist() == wanted["text"]


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


@pytest.mark.parametrize("is_noticed_by_sending", [True, False])
def test_a_client_that_disconnects_closes_the_stream(is_noticed_by_sending: bool) -> None:
    closed: list[bool] = []

    def content() -> ByteStream:
        try:
            while True:
                yield b"x"
        finally:
            closed.append(True)

    async def receive() -> Message:
        return await asyncio.Future() if is_noticed_by_sending else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.sleep(0)
        if is_noticed_by_sending and message["type"] == "http.response.body":
            raise OSError("the connection is closed")

    scope = {"type": "http", **({"asgi": {"spec_version": "2.4"}} if is_noticed_by_sending else {})}
    raised = pytest.raises(ClientDisconnect) if is_noticed_by_sending else nullcontext()
    with raised:
        asyncio.run(streamed(content())(scope, receive, send))
    assert closed == [True]


def test_what_fails_before_the_first_bytes_has_its_own_status() -> None:
    def content() -> ByteStream:
        raise Gone("It is gone.")
        yield b""

    app = FastAPI()
    errors.install(app)
    app.add_api_route("/", lambda: streamed(content()), response_model=None)
    answer = TestClient(app).get("/")
    assert (answer.status_code, answer.json()["code"]) == (410, "gone")
