"""A downloaded export against the audit record: whatever was altered, dropped, doubled, swapped or truncated is found."""

import csv
import gzip
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.datasets.storage import Sample
from service.results.content import Layout
from service.results.formats import ENCODERS, Format, batch_of
from winnow import verify as module
from winnow.merkle import JOB_METADATA, SELECTION_ROW, chunk_sha256, merkle_root, selection_sha256
from winnow.verify import CannotVerify, NotVerified, Record, job_of, rows_of, verify

CHUNK_SIZE = 256
N, K = 2 * CHUNK_SIZE + 100, 80
FORMATS = ("jsonl", "jsonl.gz", "csv", "parquet")
Table = dict[str, list[Any]]


def made() -> dict[str, np.ndarray]:
    """Influences over the whole range of float32: -0, the smallest and the largest among them."""
    random = np.random.default_rng(3)
    influence = random.integers(0, 2**32, N, dtype=np.uint32).view(np.float32)
    influence[~np.isfinite(influence)] = 0.1
    influence[:5] = [-0.0, 0.0, np.finfo(np.float32).tiny, np.finfo(np.float32).max, np.float32(1e-45)]
    weight, selected = np.zeros(N, np.float32), np.append(0, 1 + random.permutation(N - 1)[: K - 1])
    weight[selected] = random.random(K, dtype=np.float32)
    exact = random.random(N) < 0.1
    left_out = np.setdiff1d(np.arange(0, N, 7), selected)
    influence[left_out], exact[left_out] = np.nan, False
    return {"influence": influence, "weight": weight, "exact": exact, "selected": selected}


ARRAYS = made()
LEAVES = [
    chunk_sha256(*(ARRAYS[name][start : start + CHUNK_SIZE] for name in ("influence", "weight", "exact")))
    for start in range(0, N, CHUNK_SIZE)
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_SIZE", CHUNK_SIZE)


def record_of_arrays() -> Record:
    chosen = ARRAYS["selected"]
    rows = np.empty(K, SELECTION_ROW)
    rows["rank"], rows["index"] = np.arange(K), chosen
    for name in ("influence", "weight", "exact"):
        rows[name] = ARRAYS[name][chosen]
    return Record(merkle_root(LEAVES).hex(), selection_sha256(rows), N, lambda: [leaf.hex() for leaf in LEAVES])


RECORD = record_of_arrays()


def table(*, selected_only: bool) -> Table:
    chosen = ARRAYS["selected"]
    rank = np.full(N, -1)
    rank[chosen] = np.arange(K)
    rows = chosen if selected_only else np.arange(N)
    return {
        "index": rows.tolist(),
        "id": [f'a "{i}",\n' for i in rows],
        "source": [None if i % 3 else "s" for i in rows],
        "influence": [None if math.isnan(value) else value for value in ARRAYS["influence"][rows].tolist()],
        **{name: ARRAYS[name][rows].tolist() for name in ("weight", "exact")},
        "selected": (rank[rows] >= 0).tolist(),
        "rank": [None if r < 0 else r for r in rank[rows].tolist()],
    }


def write(folder: Path, kind: str, columns: Table) -> Path:
    """As the service exports it."""
    batch = batch_of(columns).replace_schema_metadata({JOB_METADATA: "job_1"})
    content = b"".join(ENCODERS[Format(kind.removesuffix(".gz"))](iter([batch])))
    path = folder / f"export.{kind}"
    path.write_bytes(gzip.compress(content, 1) if kind.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("selected_only", [False, True])
def test_an_export_as_it_was_downloaded_is_verified(tmp_path: Path, kind: str, selected_only: bool) -> None:
    found = verify(write(tmp_path, kind, table(selected_only=selected_only)), RECORD)
    assert found.is_whole is not selected_only
    assert (found.samples, found.selected) == (K if selected_only else N, K)
    assert "rank" not in found.unchecked


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_an_export_with_its_content_is_verified_all_the_same(tmp_path: Path, kind: str) -> None:
    columns = table(selected_only=True)
    samples = [Sample(i, str(i), None, [{"role": "user", "content": 'a "b"\n'}], None) for i in range(K)]
    columns |= Layout(("messages",), ()).content(samples, Format(kind))
    assert verify(write(tmp_path, kind, columns), RECORD).selected == K
    columns["weight"][1] = next_float(columns["weight"][1])
    with pytest.raises(NotVerified):
        verify(write(tmp_path, kind, columns), RECORD)


def altered(name: str, row: int, value: Callable[[Any], Any]) -> Callable[[Table], None]:
    def change(columns: Table) -> None:
        columns[name][row] = value(columns[name][row])

    return change


def next_float(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(0), dtype=np.float32))


def dropped(row: int) -> Callable[[Table], None]:
    return lambda columns: [column.pop(row) for column in columns.values()] and None


def doubled(columns: Table) -> None:
    for column in columns.values():
        column.insert(7, column[7])


def swapped(columns: Table) -> None:
    for column in columns.values():
        column[3], column[9] = column[9], column[3]


def with_its_index(columns: Table) -> None:
    """The values of two rows exchanged, each under the other's index."""
    swapped(columns)
    columns["index"].sort()


def cut_at_a_row(columns: Table) -> None:
    for column in columns.values():
        del column[-10:]


CHANGES: dict[str, Callable[[Table], None]] = {
    "the last bit of an influence": altered("influence", 50, next_float),
    "the sign of zero": altered("influence", 0, lambda value: -value),
    "a weight": altered("weight", 50, lambda value: value + 0.5),
    "an exact flag": altered("exact", 50, lambda value: not value),
    "a dropped row": dropped(50),
    "the last row dropped": dropped(-1),
    "a doubled row": doubled,
    "two rows swapped": swapped,
    "an index": altered("index", 50, lambda value: value + 1),
    "cut off at a row": cut_at_a_row,
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("selected_only", [False, True])
def test_whatever_was_changed_is_found(tmp_path: Path, kind: str, change: str, selected_only: bool) -> None:
    columns = table(selected_only=selected_only)
    CHANGES[change](columns)
    with pytest.raises(NotVerified):
        verify(write(tmp_path, kind, columns), RECORD)


@pytest.mark.parametrize("kind", FORMATS)
def test_values_under_another_index_and_another_rank_are_found(tmp_path: Path, kind: str) -> None:
    columns = table(selected_only=False)
    with_its_index(columns)
    with pytest.raises(NotVerified, match="altered in the rows 0 to 255"):
        verify(write(tmp_path, kind, columns), RECORD)
    columns = table(selected_only=False)
    one, other = ARRAYS["selected"][:2].tolist()
    columns["rank"][one], columns["rank"][other] = 1, 0
    with pytest.raises(NotVerified, match="hash of the selection"):
        verify(write(tmp_path, kind, columns), RECORD)
    columns["selected"][one] = False
    with pytest.raises(NotVerified, match="contradict"):
        verify(write(tmp_path, kind, columns), RECORD)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_influence_that_was_none_or_became_none_is_found(tmp_path: Path, kind: str) -> None:
    columns = table(selected_only=False)
    none = columns["influence"].index(None)
    some = next(i for i, (value, exact) in enumerate(zip(columns["influence"], columns["exact"], strict=True))
                if value is not None and not exact and not columns["selected"][i])  # fmt: skip
    for row, value in ((none, 0.0), (some, None), (int(ARRAYS["selected"][0]), None)):
        changed = {**columns, "influence": list(columns["influence"])}
        changed["influence"][row] = value
        with pytest.raises(NotVerified):
            verify(write(tmp_path, kind, changed), RECORD)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9999, 1.0])
def test_a_file_that_breaks_off_is_found(tmp_path: Path, kind: str, part: float) -> None:
    """Also where only the last byte is missing."""
    path = write(tmp_path, kind, table(selected_only=False))
    content = path.read_bytes()
    path.write_bytes(content[: min(int(len(content) * part), len(content) - 1)])
    with pytest.raises(NotVerified):
        verify(path, RECORD)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_bit_that_flipped_is_found(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, table(selected_only=True))
    content = bytearray(path.read_bytes())
    place = content.index(b"0.") + 3 if kind in ("jsonl", "csv") else len(content) // 3
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(NotVerified):
        verify(path, RECORD)


def test_the_first_chunk_that_differs_is_named_where_it_is_known(tmp_path: Path) -> None:
    columns = table(selected_only=False)
    columns["influence"][CHUNK_SIZE + 5] = 0.25
    path = write(tmp_path, "parquet", columns)
    with pytest.raises(NotVerified, match="in the rows 256 to 511"):
        verify(path, RECORD)
    with pytest.raises(NotVerified, match="Merkle root"):
        verify(path, replace(RECORD, chunks=lambda: None))
    with pytest.raises(NotVerified, match="Merkle root"):  # hashes that are not those of the root prove nothing
        verify(path, replace(RECORD, chunks=lambda: [LEAVES[0].hex(), *2 * ["00" * 32]]))


def test_without_the_hash_of_the_selection_it_says_what_it_cannot_check(tmp_path: Path) -> None:
    only_root = Record(RECORD.root)
    assert {"rank", "selected"} <= set(verify(write(tmp_path, "csv", table(selected_only=False)), only_root).unchecked)
    with pytest.raises(CannotVerify, match="Export all"):
        verify(write(tmp_path, "csv", table(selected_only=True)), only_root)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("influence", "NaN"),
        ("influence", "Infinity"),
        ("weight", "1e39"),
        ("weight", '"0.5"'),
        ("influence", "true"),
        ("exact", "1"),
        ("selected", "null"),
        ("rank", "-1"),
        ("rank", "0.0"),
        ("index", "true"),
        ("index", "1" * 30),
        ("weight", "1" * 400),
        ("index", "[" * 100_000),
    ],
)
def test_a_value_that_no_export_has_is_named_by_its_row(tmp_path: Path, name: str, value: str) -> None:
    lines = b"".join(ENCODERS[Format.JSONL](iter([batch_of(table(selected_only=True))]))).splitlines()
    row = json.loads(lines[2])
    fields = ",".join(f'"{key}":{value if key == name else json.dumps(row[key])}' for key in row)
    lines[2] = f"{{{fields}}}".encode()
    path = tmp_path / "export.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(NotVerified, match=r"Row 2\b|couldn't parse"):
        verify(path, RECORD)


@pytest.mark.parametrize("content", [b"", b"a,b\r\n1,2\r\n", b"{}\n", b"[]\n", b"\xff\xfe\n", b"PAR1", b"\x1f\x8b"])
def test_what_is_no_export_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "export"
    path.write_bytes(content)
    with pytest.raises(NotVerified):
        verify(path, RECORD)


def test_a_rewritten_file_with_the_same_values_is_verified(tmp_path: Path) -> None:
    """As double precision, with other columns and in another order of columns."""
    columns = table(selected_only=False)
    arrays = {name: pa.array(columns[name]) for name in ("rank", "exact", "weight", "influence", "selected", "index")}
    pq.write_table(pa.table({**arrays, "mine": arrays["index"]}), tmp_path / "copy.parquet", row_group_size=123)
    verify(tmp_path / "copy.parquet", RECORD)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = ["weight", "rank", "index", "selected", "exact", "influence"]
    writer.writerow(names)
    flags = {True: "true", False: "false"}
    writer.writerows(
        [flags.get(v, v) if isinstance(v, bool) else v for v in r]
        for r in zip(*(columns[n] for n in names), strict=True)
    )
    (tmp_path / "copy.csv").write_text(text.getvalue(), newline="")
    verify(tmp_path / "copy.csv", RECORD)


def test_a_parquet_export_says_whose_it_is(tmp_path: Path) -> None:
    assert job_of(write(tmp_path, "parquet", table(selected_only=True))) == "job_1"
    assert job_of(write(tmp_path, "csv", table(selected_only=True))) is None


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_are_read_in_batches(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4096)
    sizes = [rows.size for rows in rows_of(write(tmp_path, kind, table(selected_only=False)))]
    assert max(sizes) <= CHUNK_SIZE
    assert sum(sizes) == N


@pytest.mark.parametrize(("kind", "value"), [("jsonl", b'"x"'), ("csv", b"x")])
def test_a_row_is_named_by_its_place_in_the_file(
    tmp_path: Path, kind: str, value: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4096)
    path = write(tmp_path, kind, table(selected_only=False))
    lines = path.read_bytes().splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if line.startswith((b'{"index":400,', b"400,"))]
    assert len(starts) == 1
    number = starts[0] + (kind == "csv")  # an id has a line break, and the values follow it
    lines[number] = re.sub(rb'("weight":|,)\d\.\d*(?=,("exact":)?(true|false),)', rb"\1" + value, lines[number])
    path.write_bytes(b"".join(lines))
    with pytest.raises(NotVerified, match=r"Row 400\b"):
        verify(path, RECORD)
