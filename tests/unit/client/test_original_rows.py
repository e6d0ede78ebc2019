"""Selected rows are copied out of the file that was uploaded: byte for byte, and they are the samples that were selected."""

import gzip
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.datasets.bad_rows import OnBadRow
from service.datasets.convert import convert
from service.datasets.rows.options import RowOptions
from service.datasets.storage import Content
from service.settings import UploadSettings
from winnow import original_rows
from winnow.answers import Dataset

JSONL = (
    b'\xef\xbb\xbf{"prompt": "one",  "completion": "1", "mine": [1, 2]}\n'
    b"\n"
    b'{"prompt": "two", "completion": "2 \\u00e9", "mine": null}\r\n'
    b'{"prompt": "no completion"}\n'
    b"   \n"
    b'{"completion": "3", "prompt": "three", "mine": 3.0}\n'
    b'{"prompt": "four", "completion": "4"}'
)
JSON_ROWS = JSONL.removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True)
CSV = (
    b"prompt,completion,mine\n"
    b'one,"1, and\nmore",a\n'
    b"\n"
    b'"two ""quoted""",2,"b\n\nc"\n'
    b"no completion,,\n"
    b"three,3,d\r\n"
    b"four,4,e"
)
CSV_ROWS = [b'one,"1, and\nmore",a\n', b'"two ""quoted""",2,"b\n\nc"\n', b"three,3,d\r\n", b"four,4,e"]


def pool_of(content: bytes, folder: Path, name: str) -> tuple[Path, Dataset, Content]:
    """The file, the dataset that an upload of it makes, and the dataset's content; a bad row is skipped."""
    path = folder / name
    path.write_bytes(content)
    (folder / "content").mkdir()
    with path.open("rb") as file:
        made = convert(file, RowOptions(), UploadSettings(), folder / "content", name, OnBadRow.SKIP)
    assert (made.row_count, made.skipped) == (4, 1)
    return path, Dataset.model_validate({"detected": made.detected, "row_count": 4, "skipped": 1}), made


def skipped_of(made: Content) -> set[int]:
    assert made.report is not None
    return {json.loads(line)["number"] for line in gzip.decompress(made.report.read_bytes()).splitlines()}


def copied(source: Path, pool: Dataset, to: Path, selected: set[int], skipped: set[int]) -> bytes:
    original_rows.check(source, to, pool.detected)
    original_rows.copy(source, to, pool, selected=selected, skipped=skipped)
    return to.read_bytes()


@pytest.mark.parametrize("packed", [None, gzip.compress, partial(pa.compress, codec="zstd", asbytes=True)])
def test_json_lines_stay_as_they_are(packed: Any, tmp_path: Path) -> None:
    source, pool, made = pool_of(packed(JSONL) if packed else JSONL, tmp_path, "pool.jsonl")
    found = copied(source, pool, tmp_path / "out.jsonl", {3, 1, 0}, skipped_of(made))
    assert found == JSON_ROWS[0] + JSON_ROWS[2] + JSON_ROWS[6] + b"\n"


def test_a_table_keeps_its_names_and_what_is_quoted(tmp_path: Path) -> None:
    source, pool, made = pool_of(CSV, tmp_path, "pool.csv")
    found = copied(source, pool, tmp_path / "out.csv", {1, 2}, skipped_of(made))
    assert found == b"prompt,completion,mine\n" + CSV_ROWS[1] + CSV_ROWS[2]
    everything = copied(source, pool, tmp_path / "all.csv", {0, 1, 2, 3}, skipped_of(made))
    assert everything == b"prompt,completion,mine\n" + b"".join(CSV_ROWS) + b"\n"


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}" if i != 2 else None, "mine": i / 3} for i in range(5)]
    schema = pa.schema({"prompt": pa.string(), "completion": pa.large_string(), "mine": pa.float32()}, {"made": "here"})
    table, buffer = pa.Table.from_pylist(rows, schema), io.BytesIO()
    pq.write_table(table, buffer, row_group_size=2)
    source, pool, made = pool_of(buffer.getvalue(), tmp_path, "pool.parquet")
    copied(source, pool, tmp_path / "out.parquet", {3, 2}, skipped_of(made))
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.equals(table.take([3, 4]))
    assert found.schema.metadata[b"made"] == b"here"


def test_a_copy_may_be_compressed(tmp_path: Path) -> None:
    source, pool, made = pool_of(JSONL, tmp_path, "pool.jsonl")
    found = copied(source, pool, tmp_path / "out.jsonl.gz", {1}, skipped_of(made))
    assert gzip.decompress(found) == JSON_ROWS[2]


@pytest.mark.parametrize("name", ["pool.jsonl", "pool.csv"])
def test_what_is_copied_is_what_was_selected(name: str, tmp_path: Path) -> None:
    """Uploaded again, it has the content of these samples."""
    source, pool, made = pool_of(JSONL if name.endswith("jsonl") else CSV, tmp_path, name)
    to = tmp_path / f"out{source.suffix}"
    copied(source, pool, to, {0, 3}, skipped_of(made))
    (tmp_path / "again").mkdir()
    with to.open("rb") as file:
        again = convert(file, RowOptions(), UploadSettings(), tmp_path / "again", to.name)
    content = [column for column in pq.read_schema(made.rows).names if column != "id"]  # those without one are numbered
    whole, part = (pq.read_table(each.rows, columns=content) for each in (made, again))
    assert part.equals(whole.take([0, 3]))


@pytest.mark.parametrize(
    ("changed", "to", "why"),
    [
        ({}, "out.csv", "end it in .jsonl"),
        ({}, "out.jsonl.zst", "end it in .jsonl"),
        ({}, "out.jsonl.csv", "end it in .jsonl"),
        ({}, "pool.jsonl", "copied out of"),
        ({}, "content/../pool.jsonl", "copied out of"),
        ({"container": "parquet"}, "out.parquet.gz", "end it in .parquet"),
        ({"container": "json"}, "out.json", "not json"),
        ({"sha256": None}, "out.jsonl", "upload the file"),
        ({"sha256": "0" * 64}, "out.jsonl", "another file"),
    ],
)
def test_another_file_is_refused(changed: dict[str, Any], to: str, why: str, tmp_path: Path) -> None:
    source, pool, _ = pool_of(JSONL, tmp_path, "pool.jsonl")
    assert pool.detected is not None
    detected = pool.detected.model_copy(update=changed)
    with pytest.raises(ValueError, match=f"(?i){why}"):
        original_rows.check(source, tmp_path / to, detected)


def test_rows_that_cannot_be_told_apart_are_no_copy(tmp_path: Path) -> None:
    source, pool, _ = pool_of(JSONL, tmp_path, "pool.jsonl")
    with pytest.raises(ValueError, match="5 were found"):
        original_rows.copy(source, tmp_path / "out.jsonl", pool, selected={1}, skipped=set())
