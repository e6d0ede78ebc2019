"""What holds the rows of an upload: every container gives the same rows, told by its content; faults have their places."""

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.datasets.files.batches import Batch
from service.datasets.files.reader import Upload, open_upload
from service.datasets.values import InvalidRow
from service.http.errors import TooLarge, Unprocessable
from service.settings import UploadSettings

MIB = 2**20
WANTED = ("id", "source", "messages", "instruction", "input", "output", "prompt", "completion", "text")
ROWS = [
    {"instruction": 'Grüße, "Welt"\nund 😀; alle', "input": "a\tb", "output": "Hallo"},
    {"instruction": "Part.", "output": "Bye, bye."},
    {"instruction": "x" * 70_000, "input": "[{", "output": "}]"},
]


def jsonl(rows: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def delimited(rows: Sequence[dict[str, Any]], delimiter: str = ",", ending: str = "\r\n") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["instruction", "input", "output"], delimiter=delimiter, lineterminator=ending)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def arrow(table: pa.Table, new: Callable[..., Any] = pa.ipc.new_file, **options: Any) -> bytes:
    out = io.BytesIO()
    with new(out, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return out.getvalue()


def packed(data: bytes, packing: str) -> bytes:
    if packing == "bare":
        return data
    return gzip.compress(data) if packing == "gzip" else bytes(pa.compress(data, codec=packing, asbytes=True))


Read = Callable[..., tuple[list[tuple[int, Any]], Upload]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """All rows as (number, fields, or the words of what is wrong), and the upload."""

    def read(
        data: bytes, name: str = "", wanted: Sequence[str] | None = WANTED, *, text: bool = False, **limits: Any
    ) -> tuple[list[tuple[int, Any]], Upload]:
        (tmp_path / "upload").write_bytes(data)
        settings = UploadSettings(**limits)
        rows: list[tuple[int, Any]] = []
        with (tmp_path / "upload").open("rb") as file:
            upload = open_upload(file, name, wanted, settings, text=text)
            with closing(upload.parts):
                for part in upload.parts:
                    rows.extend(part.rows(settings.max_row_bytes) if isinstance(part, Batch) else [part])
        return [(number, str(row) if isinstance(row, InvalidRow) else row) for number, row in rows], upload

    return read


def present(rows: Sequence[tuple[int, Any]]) -> list[dict[str, Any]]:
    assert [row for _, row in rows if isinstance(row, str)] == []
    return [{name: value for name, value in row.items() if value is not None} for _, row in rows]


TABLE = pa.Table.from_pylist(ROWS, pa.schema([(name, pa.string()) for name in ("instruction", "input", "output")]))
# By what it is: the file, what tells it, and the numbers of its rows.
CONTAINERS: dict[str, tuple[bytes, str, str, list[int]]] = {
    "jsonl": (jsonl(ROWS), "", "jsonl", [1, 2, 3]),
    "array": (json.dumps(ROWS).encode(), "", "json", [1, 2, 3]),
    "array, indented": (
        b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
        "",
        "json",
        [1, 2, 3],
    ),
    "data": (json.dumps({"version": "1", "data": ROWS, "of": [{}]}).encode(), "", "json", [1, 2, 3]),
    "data, indented": (json.dumps({"version": {"a": '"}'}, "data": ROWS}, indent=2).encode(), "", "json", [1, 2, 3]),
    "objects": (b"\n".join(json.dumps(row, indent=1).encode() for row in ROWS), "", "json", [1, 2, 3]),
    "csv": (b"\xef\xbb\xbf" + delimited(ROWS), "", "csv", [2, 4, 5]),
    "csv, semicolon": (delimited(ROWS, ";", "\n"), "pool.csv", "csv", [2, 4, 5]),
    "tsv": (delimited(ROWS, "\t"), "", "tsv", [2, 4, 5]),
    "parquet": (parquet(TABLE), "", "parquet", [1, 2, 3]),
    "arrow": (arrow(TABLE), "", "arrow", [1, 2, 3]),
    "arrow, packed": (arrow(TABLE, compression="zstd"), "", "arrow", [1, 2, 3]),
    "arrow stream": (arrow(TABLE, pa.ipc.new_stream), "", "arrow_stream", [1, 2, 3]),
}


@pytest.mark.parametrize("packing", ["bare", "gzip", "zstd"])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_gives_the_same_rows(read: Read, kind: str, packing: str) -> None:
    data, name, container, numbers = CONTAINERS[kind]
    rows, upload = read(packed(data, packing), name)
    assert present(rows) == ROWS
    assert [number for number, _ in rows] == numbers
    assert (upload.container, upload.compression) == (container, None if packing == "bare" else packing)
    if container in ("csv", "tsv", "parquet", "arrow", "arrow_stream"):
        assert upload.names == ["instruction", "input", "output"]


def test_what_stands_beside_the_rows_is_told(read: Read) -> None:
    for data in (
        json.dumps({"version": 1, "data": ROWS, "n": 2}),
        json.dumps({"version": 1, "data": ROWS, "n": 2}, indent=1),
    ):
        assert read(data.encode())[1].beside == ["version", "n"]
    large = {"note": ['\\"[' * 1000] * 500, "data": [{"text": "a" * 1000}] * 2000, "end": None}
    rows, upload = read(json.dumps(large).encode())  # longer than a row may be
    assert len(present(rows)) == 2000
    assert upload.beside == ["note", "end"]


def test_a_row_with_a_column_called_data_is_a_row(read: Read) -> None:
    row = {"text": "a", "data": [{"text": "b"}]}
    for data in (json.dumps(row), json.dumps(row, indent=1), json.dumps(row) + "\n" + json.dumps({"data": [{}]})):
        rows, upload = read(data.encode())
        assert rows[0] == (1, row)
        assert upload.beside == []
    rows, upload = read(b'{"data": [{}]}\n{"text": "b"}\n')
    assert (upload.container, len(rows)) == ("jsonl", 2)


def test_text_is_parted_by_blank_lines(read: Read) -> None:
    data = b"\xef\xbb\xbf\r\n\r\nFirst, one.\r\n \r\n\r\n{Second\r\n  more\r\n\n[Third"
    expected = [(3, {"text": "First, one."}), (6, {"text": "{Second\n  more"}), (9, {"text": "[Third"})]
    for options in ({"text": True}, {"name": "a.txt"}, {"name": "A.MD.gz"}):
        rows, upload = read(data, **options)
        assert (rows, upload.container, upload.unit) == (expected, "text", "line")
    rows, _ = read(b"a\n\n" + b"b" * 60 + b"\n" + b"b" * 60 + b"\n\n\xff\n\nc", text=True, max_row_bytes=100)
    assert [number for number, _ in rows] == [1, 3, 6, 8]
    assert "longer than 100 bytes" in rows[1][1]
    assert "not UTF-8 in line 6 at byte 1" in rows[2][1]
    assert rows[3][1] == {"text": "c"}


def test_files_of_rows_are_told_from_text_where_text_is_expected(read: Read) -> None:
    assert read(b'{"text": "a"}\n', text=True)[1].container == "jsonl"
    assert read(b'[{"text": "a"}]', name="a.txt")[1].container == "json"
    assert read(b"id,text\n1,a\n", text=True)[0] == [(2, {"id": "1", "text": "a"})]
    assert read(b"Dear all, hello; bye.\nid\n", text=True)[1].container == "text"


def test_columns_of_other_names_are_told_by_the_caller_or_by_the_name_of_the_file(read: Read) -> None:
    data = b"frage;antwort\nHimmel?;Blau.\n"
    expected = [(2, {"frage": "Himmel?", "antwort": "Blau."})]
    assert read(data, wanted=("id", "frage", "antwort"))[0] == expected
    assert read(data, wanted=None)[0] == expected
    assert read(data, name="f.csv")[0] == expected
    assert read(data.replace(b";", b","), name="f.csv.zst")[0] == expected
    with pytest.raises(Unprocessable) as error:
        read(data)
    assert error.value.problem_code == "invalid_file"


def test_rows_of_a_table_that_cannot_be_taken_are_named_by_their_first_line(read: Read) -> None:
    data = b'text,input\n"a\nb",1\nc\nd,e,f\n\n,\n"' + b"x\n" * 60 + b'",y\n\xffz,1\nlast,\n'
    rows, upload = read(data, max_row_bytes=100)
    assert upload.names == ["text", "input"]
    assert [number for number, _ in rows] == [2, 4, 5, 7, 8, 69, 70]
    assert [row for _, row in rows if isinstance(row, dict)] == [{"text": "a\nb", "input": "1"}, {}, {"text": "last"}]
    faults = [row for _, row in rows if isinstance(row, str)]
    assert [fault.split()[:2] for fault in faults] == [["has", "1"], ["has", "3"], ["is", "longer"], ["is", "not"]]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b'text\n"a" b\nc\n', "line 2"),
        (b'text\nok\n"' + (b"a" * 50 + b"\n") * 50_000, "line 3"),
        (b'text,input\na,"b', "line 2"),
        (b"text,text\na,b\n", "same name"),
        (b'text,"' + b"a" * 2 * MIB + b'"\nb\n', "line 1"),
    ],
    ids=["a quote within", "an endless quote", "cut", "two of a name", "an endless header"],
)
def test_a_broken_table_is_refused_where_it_breaks(read: Read, data: bytes, line: str) -> None:
    tracemalloc.start()
    with pytest.raises(Unprocessable, match=line) as error:
        read(data, "t.csv")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.value.problem_code == "invalid_file"
    assert peak < 32 * MIB


def test_elements_of_a_document_that_cannot_be_taken_are_rows_of_their_own(read: Read) -> None:
    elements = ['{"text": "a"}', "1", '{"text": NaN}', '{"text": "' + '\\"]' * MIB + '"}', "[" * 20_000 + "]" * 20_000]
    elements += ['{"id": ' + "9" * 10_000 + "}", "12345", '{"text": "\\ud800"}', '{"text": "z"}']
    rows, _ = read(("[" + " ,\n".join(elements) + "]\n").encode())
    assert [number for number, _ in rows] == list(range(1, 10))
    assert [isinstance(row, dict) for _, row in rows] == [True, *[False] * 6, True, True]
    assert "longer than" in rows[3][1]
    assert "nested" in rows[4][1]
    rows, _ = read(b"[" + b"1234567890," * 20_000 + b"{}]")  # some of them cut where a piece of the file ends
    assert len(rows) == 20_001


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b'[{"text": "a"},\n {"text": b}]', "row 2, line 2, column 11"),
        (b'[{"text": "a"},\n {"text": "b"', "row 2, line 2"),
        (b'[{"text": "a"}\n{"text": "b"}]', "row 1, line 2, column 1"),
        (b'[{"text": "a"}, ]', "row 2, line 1, column 17"),
        (b'[{"text": "a"}] x', "row 1, line 1, column 17"),
        (b'[{"text": "a"}', "row 1, line 1"),
        (b'[{"text": "a"},\n {"text": "\xff"}]', "line 2, at byte 28"),
        (b'{"text":\n "a",\n}', "row 1, line 3, column 1"),
        (b'{"n": 1,\n"data": [{"text": "a"}]\n', "row 1, line 1|line 3"),
        (
            b"[" + b'{"text": "a"},' * 20_000 + b'{"text" 1}' + b', {"text": "a"}' * 200_000 + b"]",
            "row 20001, line 1, column 280010",
        ),
    ],
)
def test_a_malformed_document_is_refused_where_it_breaks(read: Read, data: bytes, place: str) -> None:
    with pytest.raises(Unprocessable, match=place) as error:
        read(data)
    assert error.value.problem_code == "invalid_file"


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
@pytest.mark.parametrize("kind", ["jsonl", "array", "csv", "parquet"])
def test_a_truncated_or_damaged_stream_is_told_with_where_it_ends(read: Read, kind: str, packing: str) -> None:
    rows = [{"instruction": f"{i * 7919 % 10_007:x}" * 30, "output": "b"} for i in range(5_000)]
    table = pa.Table.from_pylist(rows)
    data = {
        "jsonl": jsonl(rows),
        "array": json.dumps(rows).encode(),
        "csv": delimited(rows),
        "parquet": parquet(table),
    }[kind]
    whole = packed(data, packing)
    for broken in (whole[:-9], whole + b"something else", whole[:30]):
        with pytest.raises(
            Unprocessable, match=rf"{packing} stream.* (after (line|row) \d+|at its beginning|truncated): "
        ) as error:
            read(broken)
        assert error.value.problem_code == "invalid_file"


ZSTD_OF_A_GIBIBYTE = b"\x28\xb5\x2f\xfd\x00" + bytes([(30 - 10) << 3]) + b"\x01\x00\x00"


# Made in the test: together they would fill the memory of every process that collects it.
UNFOLDING: dict[str, Callable[[], bytes]] = {
    "blanks": lambda: packed(b"[" + b" " * 64 * MIB, "zstd"),
    "lines": lambda: packed(jsonl([{"text": "a" * 1000}]) * 64_000, "zstd"),
    "an element": lambda: packed(b'[{"text": "' + b"a" * 64 * MIB, "gzip"),
    "a quote": lambda: packed(b'text\n"' + b"a" * 64 * MIB, "zstd"),
    "parquet": lambda: packed(parquet(pa.table({"text": ["a" * MIB] * 30})), "zstd"),
    "a dictionary": lambda: packed(
        arrow(pa.table({"text": pa.repeat("a" * 50_000, 10_000).dictionary_encode()})), "gzip"
    ),
    "arrow": lambda: arrow(pa.table({"text": ["a" * MIB] * 64}), compression="zstd"),
    "a window": lambda: ZSTD_OF_A_GIBIBYTE,
}


@pytest.mark.parametrize("kind", UNFOLDING)
def test_what_unfolds_is_refused_before_it_fills_the_memory(read: Read, kind: str) -> None:
    data = UNFOLDING[kind]()
    assert len(data) < 2 * MIB
    tracemalloc.start()
    with pytest.raises(TooLarge) as error:
        read(data, max_bytes=16 * MIB)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.value.problem_code == "upload_too_large"
    assert peak < 40 * MIB


@pytest.mark.parametrize(("size", "count"), [(2_000, 20_000), (40 * MIB, 1)])
def test_a_large_document_needs_little_memory(tmp_path: Path, size: int, count: int) -> None:
    (tmp_path / "upload").write_bytes(json.dumps([{"text": "a" * size}] * count).encode())
    with (tmp_path / "upload").open("rb") as file:
        upload = open_upload(file, "", WANTED, UploadSettings(max_row_bytes=2**18))
        tracemalloc.start()
        assert sum(1 for _ in upload.parts) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 3 * MIB


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_a_batch_of_an_arrow_file_may_be_larger_than_the_memory_of_its_reader(
    tmp_path: Path, new: Callable[..., Any]
) -> None:
    (tmp_path / "upload").write_bytes(arrow(pa.table({"text": ["a" * 2**16] * 4_000, "other": [0] * 4_000}), new))
    with (tmp_path / "upload").open("rb") as file:
        upload = open_upload(file, "", WANTED, UploadSettings(parquet_memory_bytes=3 * 2**26))
        assert sum(part.columns.num_rows for part in upload.parts if isinstance(part, Batch)) == 4_000


def test_values_of_every_type_of_a_table_are_read(read: Read) -> None:
    odd = {
        "time": pa.array([1_767_225_600_000_000_001], pa.timestamp("ns", "UTC")),
        "moment": pa.array([1_000_001], pa.time64("ns")),
        "price": pa.array([Decimal("1.5")]),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())),
        "pair": pa.array([[1.5, float("nan")]], pa.list_(pa.float64(), 2)),
        "deep": pa.array([{"a": [float("nan")], "b": float("nan")}]),
        "half": pa.array([float("nan")], pa.float64()),
        "bytes": pa.array([b"\xff"], pa.large_binary()),
    }
    for data in (parquet(pa.table(odd)), arrow(pa.table(odd)), arrow(pa.table(odd), pa.ipc.new_stream)):
        for wanted in (None, tuple(odd), ("text",)):  # where none is there that is wanted, the rows say what is
            [(_, row)], upload = read(data, wanted=wanted)
            assert upload.names == list(odd)
            assert set(row) == set(odd)
            assert type(row["time"]) is datetime  # and none of pandas, which need not be there
            assert (row["pair"], row["deep"], row["half"]) == ([1.5, None], {"a": [None], "b": None}, None)
        [(_, row)], upload = read(data, wanted=("text", "half"))
        assert (row, upload.names) == ({"half": None}, list(odd))
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array(["a"])])
    with pytest.raises(Unprocessable, match="union"):
        read(arrow(pa.table({"text": union})))


def test_bad_rows_of_an_arrow_file_are_named(read: Read) -> None:
    column = pa.array([b"good"] * 100 + [b"\xff\xfe"] + [b"fine"] * 5_000).view(pa.string())
    rows, _ = read(arrow(pa.table({"text": column})))
    assert len(rows) == 5_101
    assert [(number, row) for number, row in rows if isinstance(row, str)] == [
        (101, "contains a string that is not UTF-8")
    ]


def test_a_row_of_endless_values_is_one_bad_row(read: Read) -> None:
    column = pa.array([[None] * 2_000 if i == 70 else [i] for i in range(200)], pa.list_(pa.int16()))
    rows, _ = read(parquet(pa.table({"messages": column})), max_row_bytes=1_000)
    assert [number for number, row in rows if isinstance(row, str)] == [71]
    assert [row["messages"] for _, row in rows if isinstance(row, dict)] == [[i] for i in range(200) if i != 70]


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_a_damaged_arrow_file_is_refused_or_read(read: Read, new: Callable[..., Any]) -> None:
    whole = arrow(pa.table({"text": ["a", "bc", None] * 50, "messages": [[{"role": "user"}], [], None] * 50}), new)
    for at in range(8, len(whole), len(whole) // 8):
        with_fault = whole[:at] + b"\xff\xff\xff\x7f" + whole[at + 4 :]
        for data in (with_fault, whole[:at]):
            with suppress(Unprocessable, TooLarge):
                read(data)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"PK\x03\x04 rest", "unzip"),
        (gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000", mtime=0), "tar"),
        (b"BZh91AY&SY", "bzip2"),
        (b"\xfd7zXZ\x00\x00", "xz"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-8"),
        ('{"text": "a"}'.encode("utf-16-be"), "UTF-8"),
        (gzip.compress(gzip.compress(jsonl(ROWS), mtime=0), mtime=0), "packed twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"Hello, world.\nThis is prose.\n", "format=text"),
        (bytes(range(1, 60)), "JSONL"),
        (b"GIF89a\0\0\0", "JSONL"),
    ],
)
def test_what_is_not_taken_is_refused_with_what_to_do(read: Read, data: bytes, part: str) -> None:
    with pytest.raises(Unprocessable, match=part) as error:
        read(data, "pool")
    assert error.value.problem_code == "invalid_file"


def test_a_log_line_before_the_rows_is_a_bad_line(read: Read) -> None:
    rows, upload = read(b'wrote 1 row\n{"text": "a"}\n')
    assert (upload.container, rows[1], "is not JSON" in rows[0][1]) == ("jsonl", (2, {"text": "a"}), True)
