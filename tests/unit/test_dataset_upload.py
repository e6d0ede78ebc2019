"""Conversion of a whole upload: JSONL, gzip and Parquet; budgets; faults named by their place; readers of what is stored."""

import csv
import gzip
import hashlib
import io
import json
import tracemalloc
from array import array
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.datasets import convert as convert_module
from service.datasets import storage
from service.datasets.convert import convert, repeated_ids
from service.datasets.rows.canonical import CanonicalRow
from service.datasets.rows.forms import Form
from service.datasets.rows.options import RowOptions
from service.datasets.storage import Content, ContentWriter
from service.http.errors import TooLarge, Unprocessable
from service.settings import UploadSettings
from service.storage.artifacts import ArtifactStore

MIB = 2**20


def jsonl(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **options)
    return out.getvalue()


@pytest.fixture
def read(tmp_path: Path):
    def read(data: bytes, form: Form = Form.AUTO, **limits: int) -> Content:
        (tmp_path / "upload").write_bytes(data)
        with (tmp_path / "upload").open("rb") as file:
            return convert(file, RowOptions(form), UploadSettings(**limits), tmp_path)

    return read


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def faults(error: pytest.ExceptionInfo[Unprocessable]) -> dict[str, str]:
    assert error.value.errors is not None
    return {fault["param"]: fault["message"] for fault in error.value.errors}


ROWS = [
    {"id": "a", "source": "s", "prompt": "Grüße an 世界 😀", "completion": "Hallo"},
    {"text": "plain"},
    {"id": 9, "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": ""}]},
]


def test_equal_rows_have_one_fingerprint_whatever_file_brings_them(read) -> None:
    plain = read(jsonl(*ROWS))
    lines = (
        '["a","s",{"messages":[{"content":"Grüße an 世界 😀","role":"user"},{"content":"Hallo","role":"assistant"}]}]\n'
        '["1",null,{"text":"plain"}]\n'
        '["9",null,{"messages":[{"content":"u","role":"user"},{"content":"","role":"assistant"}]}]\n'
    ).encode()
    assert plain.fingerprint == hashlib.sha256(lines).hexdigest()
    assert (plain.row_count, plain.byte_count) == (3, len(lines))
    assert plain.sources == {"s": 1, "(none)": 2}
    as_parquet = parquet(
        {
            "id": ["a", None, "9"],
            "source": pa.array(["s", None, None]).dictionary_encode(),
            "prompt": [ROWS[0]["prompt"], None, None],
            "completion": ["Hallo", None, None],
            "text": [None, "plain", None],
            "messages": [None, None, ROWS[2]["messages"]],
            "score": [1.0, 2.0, 3.0],
        }
    )
    spaced = b"\xef\xbb\xbf\n" + jsonl(*ROWS).replace(b"\n", b"\r\n \n")
    for data in (gzip.compress(jsonl(*ROWS)), jsonl(*ROWS).rstrip(), spaced, as_parquet):
        assert read(data).fingerprint == plain.fingerprint
    assert read(jsonl(*reversed(ROWS))).fingerprint != plain.fingerprint


def test_conversations_have_one_fingerprint_from_every_container_that_holds_them(read) -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    said = [{"role": "user", "content": 'Zeit, "jetzt"?'}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    said += [{"role": "tool", "content": "12"}, {"role": "assistant", "content": "Zwölf.", "weight": 1}]
    rows: list[dict[str, Any]] = [{"id": "a", "dataset": "d", "messages": said, "tools": [{"name": "clock"}]}]
    rows += [{"id": "b", "dataset": "d", "messages": [said[0], said[3]], "tools": None}]
    cells = [
        {name: json.dumps(row[name]) for name in ("messages", "tools") if row[name]} | {"id": row["id"]} for row in rows
    ]
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["id", "dataset", "messages", "tools"])
    writer.writeheader()
    writer.writerows({"dataset": "d", **row} for row in cells)
    table, file, stream = pa.Table.from_pylist(rows), io.BytesIO(), io.BytesIO()
    for new, sink in ((pa.ipc.new_file, file), (pa.ipc.new_stream, stream)):
        with new(sink, table.schema) as written:
            written.write_table(table)
    files = [jsonl(*rows), json.dumps(rows).encode(), json.dumps({"data": rows}).encode(), out.getvalue().encode()]
    files += [parquet(dict(zip(table.column_names, table.columns, strict=True))), file.getvalue(), stream.getvalue()]
    found = [read(data) for data in files]
    assert len({content.fingerprint for content in found}) == 1
    assert (found[0].row_count, found[0].sources) == (2, {"d": 2})


def test_every_bad_line_is_named_and_blank_lines_count(read) -> None:
    data = b'{"text": "ok"}\n\n{"text": 1}\nnot json\n[1]\n\xff\n{"text": NaN}\n' + b"[" * 100_000 + b"\n{}"
    with pytest.raises(Unprocessable) as error:
        read(data)
    assert error.value.problem_code == "invalid_rows"
    assert error.value.param == "line 3"
    found = faults(error)
    assert list(found) == [f"line {n}" for n in range(3, 10)]
    for line, part in enumerate(("must be a string", "not JSON", "not a JSON object", "not UTF-8", "NaN", "nested"), 3):
        assert part in found[f"line {line}"]


@pytest.mark.parametrize("data", [b"{}\n" * 30 + b'{"text": "a"}\n', parquet({"text": [""] * 30 + ["a"]})])
def test_reading_stops_after_twenty_faults(read, data: bytes) -> None:
    with pytest.raises(Unprocessable, match=r"20 rows are invalid \(there may be more\)") as error:
        read(data)
    assert len(faults(error)) == 20


def test_a_long_row_is_a_fault_and_the_next_one_is_read(read) -> None:
    data = jsonl({"text": "a" * 70_000}, {"text": "b"}, {"text": 3})
    with pytest.raises(Unprocessable) as error:
        read(data, max_row_bytes=1000)
    assert faults(error) == {"line 1": "is longer than 1,000 bytes", "line 3": "text must be a string, not a number"}


def test_repeated_ids_are_named_with_both_lines(read) -> None:
    rest = jsonl({"id": "x", "text": "b"}, {"text": "c"}, {"id": "x", "text": "d"})
    with pytest.raises(Unprocessable) as error:
        read(jsonl({"id": "2", "text": "a"}) + b"\n" + rest)
    found = faults(error)
    assert list(found) == ["line 4", "line 5"]
    assert 'has the id "2" of line 1' in found["line 4"]
    assert 'has the id "x" of line 3' in found["line 5"]


def test_equal_hashes_are_only_a_suspicion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "_SUSPECTS_AT_ONCE", 1)
    ids = ["a", "b", "a", "c", "d", "e", "d"]
    with ContentWriter(tmp_path) as writer:
        for id in ids:
            writer.append(CanonicalRow(id, None, '{"text":"t"}'))
    hashes = array("q", [1, 1, 1, 5, 3, 5, 3])  # a, b collide; so do c, e
    assert list(repeated_ids(writer.content().ids, hashes)) == [("a", 0, 2), ("d", 4, 6)]


@pytest.mark.parametrize(
    "data", [b"", b"\n \n", gzip.compress(b"", mtime=0), parquet({"text": pa.array([], pa.string())})], ids=repr
)
def test_an_upload_without_rows_is_an_error(read, data: bytes) -> None:
    with pytest.raises(Unprocessable, match="no rows") as error:
        read(data)
    assert error.value.problem_code == "invalid_file"


@pytest.mark.parametrize("form", ["{}\n", "[{}]"], ids=["a line", "an element"])
def test_a_name_that_stands_twice_is_the_fault_of_its_row(read, form: str) -> None:
    row = '{"prompt": "one", "prompt": "two", "completion": "c"}'
    nested = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]}'
    for fault in (row, nested):
        with pytest.raises(Unprocessable) as error:
            read(form.replace("{}", fault).encode())
        assert (error.value.problem_code, len(error.value.errors or [])) == ("invalid_rows", 1)


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(jsonl(*ROWS))[:-12],
        gzip.compress(jsonl(*ROWS)) + b"rest",
        b"\x1f\x8bnothing",
        b"PAR1 nothing PAR1",
        parquet({"text": ["a"] * 5000})[:-40],
    ],
    ids=["gzip cut", "gzip with a tail", "no gzip", "no parquet", "parquet cut"],
)
def test_a_damaged_file_is_distinguished_from_a_bad_row(read, data: bytes) -> None:
    with pytest.raises(Unprocessable) as error:
        read(data)
    assert error.value.problem_code == "invalid_file"


@pytest.mark.parametrize(
    "data",
    [jsonl(*ROWS), gzip.compress(jsonl(*ROWS)), parquet({"text": list("abc")})],
    ids=["jsonl", "gzip", "parquet"],
)
def test_rows_beyond_the_budget_are_refused(read, data: bytes) -> None:
    assert read(data, max_rows=3).row_count == 3
    with pytest.raises(TooLarge, match="more than 2"):
        read(data, max_rows=2)


def nested_dictionary(rows: int, value: str) -> pa.Array:
    """One conversation a row, whose contents are all the one value of a dictionary."""
    messages = 2 * rows
    roles = pa.array(["user", "assistant"] * rows)
    contents = pa.DictionaryArray.from_arrays(pa.array([0] * messages, pa.int8()), pa.array([value]))
    return pa.ListArray.from_arrays(
        pa.array(range(0, messages + 1, 2), pa.int32()),
        pa.StructArray.from_arrays([roles, contents], ["role", "content"]),
    )


def test_values_that_are_no_text_are_bad_rows(read) -> None:
    odd = [pa.array([b"x"]), pa.array([datetime(2026, 1, 1)]), pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8()))]
    for column in [*odd, pa.array([1.5])]:
        with pytest.raises(Unprocessable) as error:
            read(parquet({"text": column}))
        assert faults(error)["row 1"].startswith("text must be a string, not a")
    moments = pa.array([[{"role": "assistant", "content": "a", "at": datetime(2026, 1, 1)}]])
    assert read(parquet({"messages": moments})).row_count == 1  # what is not read may be of any type


def test_text_of_any_arrow_type_is_text(read) -> None:
    plain = read(parquet({"text": ["a", None, "c"], "prompt": [None, "b", None], "completion": [None, "d", None]}))
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.large_string()), pa.json_()):
        prompt = pa.array([None, "b", None], pa.string()).cast(pa.large_string())
        columns = {"text": pa.array(["a", None, "c"], pa.string()).cast(kind), "prompt": prompt}
        assert read(parquet({**columns, "completion": [None, "d", None]})).fingerprint == plain.fingerprint, kind


def bomb(kind: str) -> bytes:
    """Hundreds of megabytes in a small file."""
    if kind == "gzip":
        return gzip.compress(jsonl({"text": "a" * 10_000}) * 100) * 500
    if kind == "gzip, one line":
        return gzip.compress(b" " * 10 * MIB) * 50
    if kind == "parquet dictionary":  # the footer declares a few kilobytes
        return parquet({"text": pa.array(["a" * 50_000] * 10_000).dictionary_encode()}, compression="zstd")
    if kind == "parquet nested dictionary":
        return parquet({"messages": nested_dictionary(5_000, "a" * 50_000)}, compression="zstd")
    return parquet({"text": pa.array(["a" * 5 * MIB] * 20)}, compression="zstd", use_dictionary=False)


@pytest.mark.parametrize(
    "kind", ["gzip", "gzip, one line", "parquet dictionary", "parquet nested dictionary", "parquet pages"]
)
def test_a_bomb_is_refused_before_it_fills_the_memory(read, kind: str) -> None:
    data = bomb(kind)
    assert len(data) < 4 * MIB
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match=r"after decompression|too much memory"):
            read(data, max_bytes=16 * MIB)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * MIB


def test_bad_parquet_rows_are_named(read) -> None:
    column = pa.array([b"good", b"\xff\xfe", b"a" * 2000, None]).view(pa.string())
    with pytest.raises(Unprocessable) as error:
        read(parquet({"text": column}), max_row_bytes=1000)
    found = faults(error)
    assert list(found) == ["row 2", "row 3", "row 4"]
    assert "not UTF-8" in found["row 2"]
    assert "longer than 1,000 bytes" in found["row 3"]


def test_sources_are_counted_up_to_a_thousand_names(read) -> None:
    rows = [{"text": "t", "source": f"s{i}"} for i in range(1003)] + [{"text": "t"}, {"text": "t", "source": "s0"}]
    sources = read(jsonl(*rows)).sources
    assert len(sources) == 1002
    assert (sources["s0"], sources["(other)"], sources["(none)"]) == (2, 3, 1)


def test_what_is_published_is_read_back_in_order_and_at_random(read, store: ArtifactStore) -> None:
    n = 3 * storage.GROUP_ROWS + 5
    rows = ({"id": f"r{i}", "source": "even" if i % 2 == 0 else None, "text": f"t{i}"} for i in range(n))
    content = read(jsonl(*rows))
    storage.publish(store, content)
    fingerprint = content.fingerprint
    assert store.exists(f"datasets/{fingerprint[:2]}/{fingerprint}/rows.parquet")

    samples = list(storage.iter_samples(store, fingerprint))
    assert [sample.index for sample in samples] == list(range(n))
    assert samples[4097] == storage.Sample(4097, "r4097", None, None, "t4097")

    batches = list(storage.iter_ids(store, fingerprint))
    assert [id for ids, _ in batches for id in ids] == [f"r{i}" for i in range(n)]

    for start, stop in ((0, 3), (4090, 4100), (4096, 8192), (n - 2, n + 10), (n, n + 5), (5, 5)):
        ids, sources = storage.read_ids(store, fingerprint, start, stop)
        assert ids == [f"r{i}" for i in range(start, min(stop, n))]
        assert sources == ["even" if i % 2 == 0 else None for i in range(start, min(stop, n))]

    indices = [n - 1, 0, 4096, 4095, 0]
    assert storage.read_samples(store, fingerprint, indices) == [samples[i] for i in indices]
    assert storage.read_samples(store, fingerprint, []) == []
    for index in (-1, n):
        with pytest.raises(IndexError, match=f"{n} rows"):
            storage.read_samples(store, fingerprint, [index])


def test_row_groups_are_cut_by_size_as_well(read, store: ArtifactStore) -> None:
    content = read(jsonl(*({"text": f"{i}" + "x" * 900_000} for i in range(50))))
    storage.publish(store, content)
    with storage.open_parquet(store, storage.rows_key(content.fingerprint)) as file:
        assert file.num_row_groups == 2
    sample = storage.read_samples(store, content.fingerprint, [49])[0]
    assert sample.text is not None
    assert sample.text.startswith("49x")
    assert storage.read_ids(store, content.fingerprint, 35, 40)[0] == ["35", "36", "37", "38", "39"]


def test_publishing_twice_keeps_the_first(read, store: ArtifactStore) -> None:
    storage.publish(store, read(jsonl(*ROWS)))
    again = read(jsonl(*ROWS))
    storage.publish(store, again)
    assert again.rows.exists()
    assert [sample.id for sample in storage.iter_samples(store, again.fingerprint)] == ["a", "1", "9"]


def is_refused(read, data: bytes, **limits: float) -> str:
    with pytest.raises(TooLarge) as error:
        read(data, **limits)
    return error.value.problem_code


REPEATED = jsonl({"text": "a" * 90}) * 500
MADE = {"jsonl": REPEATED, "gzip": gzip.compress(REPEATED), "parquet": parquet({"text": ["a" * 90] * 500})}


@pytest.mark.parametrize("kind", ["gzip", "parquet"])
def test_what_a_file_expands_to_is_in_proportion_to_it(read, kind: str) -> None:
    data = MADE[kind]
    assert read(data, free_expansion_bytes=0, max_expansion=2 * len(REPEATED) / len(data)).row_count == 500
    assert read(data, free_expansion_bytes=2 * len(REPEATED), max_expansion=1).row_count == 500
    assert is_refused(read, data, free_expansion_bytes=0, max_expansion=10) == "upload_too_large"


@pytest.mark.parametrize("kind", MADE)
def test_the_time_that_a_file_takes_is_in_proportion_to_it(read, kind: str) -> None:
    data = MADE[kind]
    assert read(data, base_seconds=0.001, seconds_per_mib=100).row_count == 500
    assert is_refused(read, data, base_seconds=1e-6, seconds_per_mib=1e-6) == "upload_too_costly"
