"""Checking a downloaded export against the audit record of its job.

Of a file with all samples, index, influence, weight and exact are covered by the Merkle root; rank and selected, and all of
these in a file with the selection only, by `selection_sha256`. Numbers are compared as the float32 that they are. Ids, sources
and content are not covered: the pool's fingerprint is over those.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from service.results.formats import JOB_METADATA
from service.results.merkle import SELECTION_ROW, chunk_sha256, merkle_root, selection_sha256
from service.results.tables import CHUNK_SIZE

_TYPES = {
    "index": pa.types.is_integer,
    "influence": pa.types.is_floating,
    "weight": pa.types.is_floating,
    "exact": pa.types.is_boolean,
    "selected": pa.types.is_boolean,
    "rank": pa.types.is_integer,
}
_COLUMNS = tuple(_TYPES)
_NOT_SELECTED = -1
# `rank` is _NOT_SELECTED where there is none.
_ROW = np.dtype(
    [("index", "i8"), ("influence", "f4"), ("weight", "f4"), ("exact", "?"), ("selected", "?"), ("rank", "i8")]
)
Rows = npt.NDArray[np.void]


class NotVerified(Exception):
    """The file is not what the job has exported; the message says where it differs."""


class CannotVerify(Exception):
    """What is known of the job is not enough to check the file."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of the job. `selection` is missing from the records of earlier versions; `chunks` are the Merkle leaves."""

    root: str
    selection: str | None = None
    samples: int | None = None
    chunks: Callable[[], list[str] | None] = lambda: None

    @classmethod
    def of_provenance(
        cls, provenance: dict[str, Any], chunks: Callable[[], list[str] | None] = lambda: None
    ) -> "Record":
        """Of what `GET provenance` answered."""
        record = provenance["record"]
        samples = record.get("pool", {}).get("rows")
        return cls(provenance["weights_root"], record.get("selection_sha256"), samples, chunks)


@dataclass(frozen=True, slots=True)
class Verified:
    """`is_whole`: all samples, not the selection only. `unchecked`: columns that the record knows nothing of."""

    is_whole: bool
    samples: int
    selected: int
    unchecked: tuple[str, ...]


def job_of(path: Path) -> str | None:
    """The job that a Parquet export says it is of."""
    if _kind(path) != "parquet":
        return None
    with _told(path):
        metadata = pq.read_schema(path).metadata or {}
    return metadata[JOB_METADATA].decode() if JOB_METADATA in metadata else None


def verify(path: Path, record: Record) -> Verified:
    """Reads the file once, in constant memory but for 25 bytes a selected sample.

    Raises:
        NotVerified: it is not what the job has exported.
        CannotVerify: the record does not say what it should be.
    """
    summed = _Sum()
    for rows in rows_of(path):
        summed.add(rows)
    summed.end()
    if summed.count == 0:
        raise NotVerified("The file has no rows.")
    unchecked = ("id", "source", "messages or text")
    if summed.is_selection_only:
        if record.selection is None:
            raise CannotVerify(
                "The record holds no hash of the selection: it is of an earlier version, or only the root was given. Export all"
                " samples and verify that file."
            )
        summed.check_selection(record.selection, in_file_order=True)
        return Verified(False, summed.count, summed.count, unchecked)
    summed.check_all(record)
    if record.selection is None:
        return Verified(True, summed.count, summed.selected_count, ("selected", "rank", *unchecked))
    summed.check_selection(record.selection, in_file_order=False)
    return Verified(True, summed.count, summed.selected_count, unchecked)


class _Sum:
    """The hashes of rows as they come."""

    def __init__(self) -> None:
        self.count = self.selected_count = 0
        self._first_astray: tuple[int, int] | None = None  # the first row whose index is not its place, and that index
        self._pending: Rows = np.empty(0, _ROW)
        self._leaves: list[bytes] = []
        self._selected: list[npt.NDArray[np.void]] = []

    def add(self, rows: Rows) -> None:
        for name in ("influence", "weight"):
            if (wrong := np.flatnonzero(~np.isfinite(rows[name]))).size:
                raise NotVerified(f"Row {self.count + wrong[0]:,}: {name} is not a finite number.")
        ranked = rows["rank"] != _NOT_SELECTED
        if (wrong := np.flatnonzero(ranked != rows["selected"])).size:
            raise NotVerified(f"Row {self.count + wrong[0]:,}: selected and rank contradict each other.")
        astray = np.flatnonzero(rows["index"] != np.arange(self.count, self.count + rows.size))
        if self._first_astray is None and astray.size:
            self._first_astray = self.count + int(astray[0]), int(rows["index"][astray[0]])
        chosen = rows[ranked]
        packed = np.empty(chosen.size, SELECTION_ROW)
        for name in SELECTION_ROW.names or ():
            packed[name] = chosen[name]
        self._selected.append(packed)
        self.count += rows.size
        self.selected_count += chosen.size
        self._pending = np.concatenate([self._pending, rows])
        while self._pending.size >= CHUNK_SIZE:
            self._leaf(CHUNK_SIZE)

    def end(self) -> None:
        if self._pending.size:
            self._leaf(self._pending.size)

    def _leaf(self, size: int) -> None:
        chunk, self._pending = self._pending[:size], self._pending[size:]
        self._leaves.append(chunk_sha256(chunk["influence"], chunk["weight"], chunk["exact"]))

    @property
    def is_selection_only(self) -> bool:
        return self.selected_count == self.count and self._first_astray is not None

    def check_all(self, record: Record) -> None:
        if self._first_astray is not None:
            row, index = self._first_astray
            raise NotVerified(f"Row {row:,} has index {index:,}: a row is missing, doubled or out of order.")
        if record.samples is not None and record.samples != self.count:
            raise NotVerified(f"The file has {self.count:,} rows, the job {record.samples:,} samples.")
        if merkle_root(self._leaves).hex() == record.root:
            return
        chunks = record.chunks()
        if chunks is None or merkle_root([bytes.fromhex(chunk) for chunk in chunks]).hex() != record.root:
            raise NotVerified(
                "The Merkle root of the file is not that of the job: a value was altered, or rows are missing."
            )
        for number, (leaf, chunk) in enumerate(zip(self._leaves, chunks, strict=False)):
            if leaf.hex() != chunk:
                stop = min((number + 1) * CHUNK_SIZE, self.count)
                raise NotVerified(f"A value was altered in the rows {number * CHUNK_SIZE:,} to {stop - 1:,}.")
        raise NotVerified(f"The file has {self.count:,} rows, and the job others.")

    def check_selection(self, sha256: str, *, in_file_order: bool) -> None:
        rows = np.concatenate(self._selected)
        if not in_file_order:
            rows = np.sort(rows, order="rank", kind="stable")
        if (wrong := np.flatnonzero(rows["rank"] != np.arange(rows.size))).size:
            raise NotVerified(
                f"There is no row of rank {wrong[0]:,} where it should be: one is missing, doubled or moved."
            )
        if selection_sha256(rows) != sha256:
            raise NotVerified(
                "The hash of the selection is not that of the job: a value was altered, or rows are missing."
            )


def rows_of(path: Path) -> Iterator[Rows]:
    """The file's rows, some thousand at a time.

    Raises:
        NotVerified: it is no export, is damaged, or breaks off.
    """
    kind = _kind(path)
    with _told(path):
        if kind == "parquet":
            yield from _parquet_rows(path)
            return
        with gzip.open(path) if kind == "gzip" else path.open("rb") as file:
            lines = _whole_lines(file)
            first = next(lines, b"")
            rest = chain([first] if first else [], lines)
            yield from _packed(_json_rows(rest) if first.startswith(b"{") else _csv_rows(rest))


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What a damaged file makes its readers raise, as NotVerified."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise NotVerified(f"{path.name} is damaged or breaks off: {error}") from error


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    return "parquet" if start == b"PAR1" else "gzip" if start[:2] == b"\x1f\x8b" else "text"


def _whole_lines(file: Iterable[bytes]) -> Iterator[bytes]:
    for line in file:
        if not line.endswith(b"\n"):
            raise NotVerified("The file breaks off in the midst of a row.")
        yield line


def _parquet_rows(path: Path) -> Iterator[Rows]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        for name, is_kind in _TYPES.items():
            if schema.names.count(name) != 1 or not is_kind(schema.field(name).type):
                raise NotVerified(f"The file is no export: it has not one column {name} of the right type.")
        for batch in file.iter_batches(CHUNK_SIZE, columns=list(_COLUMNS)):
            rows = np.empty(batch.num_rows, _ROW)
            for name in _COLUMNS:
                column = batch.column(name)
                if name == "rank":
                    column = column.fill_null(_NOT_SELECTED)
                if column.null_count:
                    raise NotVerified(f"A row has no {name}.")
                rows[name] = column.to_numpy(zero_copy_only=False)
            yield rows


def _packed(rows: Iterable[tuple[Any, ...]]) -> Iterator[Rows]:
    """Tuples in the order of `_COLUMNS`, as arrays."""
    batch: list[tuple[Any, ...]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == CHUNK_SIZE:
            yield _as_array(batch)
            batch = []
    if batch:
        yield _as_array(batch)


def _as_array(batch: list[tuple[Any, ...]]) -> Rows:
    try:
        with np.errstate(over="ignore"):  # what float32 does not hold is infinite, and named so
            return np.array(batch, _ROW)
    except OverflowError as error:
        raise NotVerified(f"A number is out of range: {error}.") from error


def _json_rows(lines: Iterable[bytes]) -> Iterator[tuple[Any, ...]]:
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise NotVerified(f"Row {number:,} is no JSON.") from None
        if not isinstance(row, dict):
            _wrong(number, "a row is an object")
        values = [row.get(name) for name in _COLUMNS]
        index, influence, weight, exact, selected, rank = values
        if type(index) is not int or type(exact) is not bool or type(selected) is not bool:
            _wrong(number, "index is an integer, exact and selected are true or false")
        if not all(type(value) in (int, float) for value in (influence, weight)):
            _wrong(number, "influence and weight are numbers")
        if rank is not None and (type(rank) is not int or rank < 0):
            _wrong(number, "rank is an integer from 0, or null")
        yield index, influence, weight, exact, selected, _NOT_SELECTED if rank is None else rank


def _csv_rows(lines: Iterable[bytes]) -> Iterator[tuple[Any, ...]]:
    reader = csv.reader((line.decode() for line in lines), strict=True)
    header = next(reader, [])
    if missing := set(_COLUMNS) - set(header):
        raise NotVerified(f"The file is no export: it has no column {', '.join(sorted(missing))}.")
    places = [header.index(name) for name in _COLUMNS]
    flags = {"true": True, "false": False}
    for number, fields in enumerate(reader):
        if len(fields) != len(header):
            _wrong(number, f"a row has {len(header)} fields, not {len(fields)}")
        index, influence, weight, exact, selected, rank = (fields[place] for place in places)
        try:
            taken = int(rank) if rank else _NOT_SELECTED
            row = int(index), float(influence), float(weight), flags[exact], flags[selected], taken
        except (ValueError, KeyError) as error:
            _wrong(number, f"{error} is not a value of an export")
        if rank and taken < 0:
            _wrong(number, "rank is an integer from 0, or nothing")
        yield row


def _wrong(number: int, why: str) -> NoReturn:
    raise NotVerified(f"Row {number:,} cannot be read: {why}.")
