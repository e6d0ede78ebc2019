"""Properties of the readers of uploads: any bytes are read or refused, any rows come back from every container."""

import csv
import gzip
import io
import json
from contextlib import closing, suppress
from tempfile import TemporaryFile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.datasets.files.batches import Batch
from service.datasets.files.reader import Upload, open_upload
from service.datasets.values import InvalidRow
from service.http.errors import TooLarge, Unprocessable
from service.settings import UploadSettings

COLUMNS = ("id", "text", "prompt", "completion")
LIMITS = UploadSettings(max_row_bytes=2**16)


def rows_of(data: bytes, name: str = "", *, text: bool = False, columns: Any = COLUMNS) -> tuple[list[Any], Upload]:
    with TemporaryFile() as file:
        file.write(data)
        upload = open_upload(file, name, columns, LIMITS, text=text)
        rows: list[Any] = []
        with closing(upload.parts):
            for part in upload.parts:
                rows.extend(part.rows(LIMITS.max_row_bytes) if isinstance(part, Batch) else [part])
        numbers = [number for number, _ in rows]
        assert numbers == sorted(set(numbers))
        return [row for _, row in rows], upload


# What the readers give a meaning to, in any order and between anything.
PIECES = [
    b'{"text": "a"}',
    b'{"data": [',
    b"]}",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b'"',
    b"\\",
    b":",
    b"\n",
    b"\r\n",
    b"\t",
    b";",
]
PIECES += [
    b"text",
    b"id,text\n",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\xf0\x9f\x98",
    b"\0",
    b"NaN",
    b"1e999",
    b"-",
    b"tru",
    b" \n\n ",
    b"\\ud800",
]
CONTENTS = st.lists(st.sampled_from(PIECES) | st.binary(max_size=6), max_size=12).map(b"".join)
NAMES = st.sampled_from(["", "a.csv", "a.tsv.gz", "a.txt", "a.jsonl", "a.json"])


@given(CONTENTS, NAMES, st.booleans(), st.sampled_from([COLUMNS, None]), st.booleans())
@settings(max_examples=1_500, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes, name: str, text: bool, columns: Any, is_packed: bool) -> None:
    content = gzip.compress(data, 1) if is_packed else data
    if content.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"\x28\xb5\x2f\xfd")):
        return  # for the isolated process, which is tried elsewhere
    with suppress(TooLarge, Unprocessable):
        rows, _ = rows_of(content, name, text=text, columns=columns)
        assert all(isinstance(row, dict | InvalidRow) for row in rows)


STRINGS = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(COLUMNS) | STRINGS, VALUES, max_size=4), min_size=1, max_size=5)


@given(ROWS, st.booleans(), st.sampled_from([None, 0, 1]))
@example([{"text": "a"}, {"data": [{}]}], True, None)
@example([{"\ufeff": "\u2028\x85\x1c"}], False, 1)
@settings(max_examples=300, deadline=None)
def test_any_rows_are_the_same_from_every_json_file(
    rows: list[dict[str, Any]], ascii: bool, indent: int | None
) -> None:
    def written(value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=ascii, indent=indent).encode()

    lines = b"\n".join(json.dumps(row, ensure_ascii=ascii).encode() for row in rows)
    assert rows_of(written(rows))[0] == rows
    assert rows_of(written({"a": [rows], "data": rows, '"]': rows}))[0] == rows
    if not (len(rows) == 1 and isinstance(rows[0].get("data"), list)):  # which would be the rows of a document
        assert rows_of(lines)[0] == rows
        if indent is not None and all(rows):
            assert rows_of(b"\n".join(map(written, rows)))[0] == rows


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12)
TABLES = st.lists(st.fixed_dictionaries({"text": CELLS, "prompt": CELLS, "completion": CELLS}), min_size=1, max_size=4)


@given(
    TABLES,
    st.sampled_from(",;\t"),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=300, deadline=None)
def test_any_cells_come_back_from_csv(table: list[dict[str, str]], delimiter: str, quoting: Any, ending: str) -> None:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(
        out, ["text", "prompt", "completion"], delimiter=delimiter, quoting=quoting, lineterminator=ending
    )
    writer.writeheader()
    writer.writerows(table)
    found, upload = rows_of(out.getvalue().encode())
    assert upload.container == ("tsv" if delimiter == "\t" else "csv")
    assert found == [{name: cell for name, cell in row.items() if cell} for row in table]


@given(TABLES)
@settings(max_examples=8, deadline=None)
def test_any_strings_come_back_from_parquet_and_arrow(table: list[dict[str, str]]) -> None:
    columns = pa.Table.from_pylist(table)
    file, stream, parquet = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pq.write_table(columns, parquet)
    for new, out in ((pa.ipc.new_file, file), (pa.ipc.new_stream, stream)):
        with new(out, columns.schema) as writer:
            writer.write_table(columns)
    for data in (
        file.getvalue(),
        stream.getvalue(),
        parquet.getvalue(),
        pa.compress(parquet.getvalue(), "zstd", asbytes=True),
    ):
        assert rows_of(data)[0] == table
