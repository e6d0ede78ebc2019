"""Verification of a downloaded export against the audit record of its job.

In a file with all samples, index, influence, weight and exact are covered by the Merkle root, rank and selected by
`selection_sha256`; in a file with the selection only, all of them by the latter. Numbers are compared as the float32 that they
are; an influence may be null. Ids, sources and content are not covered: the pool's fingerprint is computed from those.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from winnow.answers import Provenance
from winnow.merkle import CHUNK_SIZE, JOB_METADATA, SELECTION_ROW, chunk_sha256, merkle_root, selection_sha256

_BLOCK_BYTES = 2**23
"""Text that is read at a time. A row must fit: the service accepts 1 MiB of content, which escapes can make six times as long."""
_UNRANKED = -1
"""The `rank` of a sample that was not selected."""
_NULL = {"rank": _UNRANKED, "influence": float("nan")}
_TYPES = {"index": "i8", "influence": "f4", "weight": "f4", "exact": "?", "selected": "?", "rank": "i8"}
_ROW = np.dtype(list(_TYPES.items()))
_SCHEMA = pa.schema({name: pa.from_numpy_dtype(np.dtype(kind)) for name, kind in _TYPES.items()})
Rows = npt.NDArray[np.void]


class NotVerified(Exception):
    """The file is not what the job exported; the message says where it differs."""


class CannotVerify(Exception):
    """The record lacks the hash that the file is to be checked against."""


@dataclass(frozen=True, slots=True)
class Record:
    """The hashes of a job. Records of earlier versions have no `selection`; `chunks` returns the Merkle leaves, where known."""

    root: str
    selection: str | None = None
    samples: int | None = None
    chunks: Callable[[], list[str] | None] = lambda: None

    @classmethod
    def of_provenance(
        cls, provenance: Provenance | dict[str, Any], chunks: Callable[[], list[str] | None] = lambda: None
    ) -> "Record":
        """From the response of `GET provenance`."""
        record = provenance["record"]
        samples = record.get("pool", {}).get("rows")
        return cls(provenance["weights_root"], record.get("selection_sha256"), samples, chunks)


@dataclass(frozen=True, slots=True)
class Verified:
    """`is_whole`: all samples, not only the selection. `unchecked`: columns that the record does not cover."""

    is_whole: bool
    samples: int
    selected: int
    unchecked: tuple[str, ...]


def job_of(path: Path) -> str | None:
    """The job that a Parquet export names in its metadata."""
    if _kind(path) != "parquet":
        return None
    with _read_errors(path):
        metadata = pq.read_schema(path).metadata or {}
    return metadata[JOB_METADATA].decode() if JOB_METADATA in metadata else None


def verify(path: Path, record: Record) -> Verified:
    """Reads the file once, in constant memory except for 25 bytes per selected sample.

    Raises:
        NotVerified: it is not what the job has exported.
        CannotVerify: the record lacks the hash that the file is to be checked against.
    """
    found = _Digest()
    for rows in rows_of(path):
        found.add(rows)
    found.end()
    if found.count == 0:
        raise NotVerified("The file has no rows.")
    unchecked = ("id", "source", "messages or text")
    if found.is_selection_only:
        if record.selection is None:
            raise CannotVerify(
                "The record has no hash of the selection: it is from an earlier version, or only the root was given. Export all"
                " samples and verify that file."
            )
        found.check_selection(record.selection, in_file_order=True)
        return Verified(False, found.count, found.count, unchecked)
    found.check_all(record)
    if record.selection is None:
        return Verified(True, found.count, found.selected_count, ("selected", "rank", *unchecked))
    found.check_selection(record.selection, in_file_order=False)
    return Verified(True, found.count, found.selected_count, unchecked)


class _Digest:
    """The hashes of rows as they arrive."""

    def __init__(self) -> None:
        self.count = self.selected_count = 0
        self._first_misplaced: tuple[int, int] | None = (
            None  # the first row whose index is not its position, and the index
        )
        self._pending: Rows = np.empty(0, _ROW)
        self._leaves: list[bytes] = []
        self._selected: list[npt.NDArray[np.void]] = []

    def add(self, rows: Rows) -> None:
        for name, bad in (("influence", np.isinf(rows["influence"])), ("weight", ~np.isfinite(rows["weight"]))):
            if (wrong := np.flatnonzero(bad)).size:
                raise NotVerified(f"Row {self.count + wrong[0]:,}: {name} is not a finite number.")
        left_out, ranked = np.isnan(rows["influence"]), rows["rank"] != _UNRANKED
        if (wrong := np.flatnonzero(left_out & (ranked | rows["exact"] | (rows["weight"] != 0)))).size:
            raise NotVerified(
                f"Row {self.count + wrong[0]:,}: it has no influence, but is exact, weighted or selected."
            )
        if (wrong := np.flatnonzero((ranked != rows["selected"]) | (rows["rank"] < _UNRANKED))).size:
            raise NotVerified(f"Row {self.count + wrong[0]:,}: selected and rank contradict each other.")
        misplaced = np.flatnonzero(rows["index"] != np.arange(self.count, self.count + rows.size))
        if self._first_misplaced is None and misplaced.size:
            self._first_misplaced = self.count + int(misplaced[0]), int(rows["index"][misplaced[0]])
        self._selected.append(rows[ranked][list(SELECTION_ROW.names or ())].astype(SELECTION_ROW))
        self.count += rows.size
        self.selected_count += int(ranked.sum())
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
        return self.selected_count == self.count and self._first_misplaced is not None

    def check_all(self, record: Record) -> None:
        if self._first_misplaced is not None:
            row, index = self._first_misplaced
            raise NotVerified(f"Row {row:,} has index {index:,}: a row is missing, duplicated or out of order.")
        if record.samples is not None and record.samples != self.count:
            raise NotVerified(f"The file has {self.count:,} rows, the job {record.samples:,} samples.")
        if merkle_root(self._leaves).hex() == record.root:
            return
        chunks = record.chunks()
        if chunks is None or merkle_root([bytes.fromhex(chunk) for chunk in chunks]).hex() != record.root:
            raise NotVerified(
                "The Merkle root of the file differs from the job's: a value was altered, or rows are missing."
            )
        for number, (leaf, chunk) in enumerate(zip(self._leaves, chunks, strict=False)):
            if leaf.hex() != chunk:
                stop = min((number + 1) * CHUNK_SIZE, self.count)
                raise NotVerified(f"A value was altered in the rows {number * CHUNK_SIZE:,} to {stop - 1:,}.")
        raise NotVerified(f"The file has {self.count:,} rows, but the job has a different number.")

    def check_selection(self, sha256: str, *, in_file_order: bool) -> None:
        rows = np.concatenate(self._selected)
        if not in_file_order:
            rows = np.sort(rows, order="rank", kind="stable")
        if (wrong := np.flatnonzero(rows["rank"] != np.arange(rows.size))).size:
            raise NotVerified(f"The row of rank {wrong[0]:,} is missing, duplicated or out of order.")
        if selection_sha256(rows) != sha256:
            raise NotVerified(
                "The hash of the selection differs from the job's: a value was altered, or rows are missing."
            )


def rows_of(path: Path) -> Iterator[Rows]:
    """The file's rows, some thousand at a time.

    Raises:
        NotVerified: it is not an export, or is corrupt or truncated.
    """
    count = 0
    with _read_errors(path) as position:
        for batch in _batches(path):
            rows = np.empty(batch.num_rows, _ROW)
            for name, column in zip(_SCHEMA.names, batch.select(_SCHEMA.names).cast(_SCHEMA), strict=True):
                if name in _NULL:
                    column = column.fill_null(_NULL[name])
                if column.null_count:
                    raise NotVerified(f"Row {count + column.is_null().index(True).as_py():,} has no {name}.")
                rows[name] = column.to_numpy(zero_copy_only=False)
            yield rows
            count = position[0] = count + rows.size


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    kind = _kind(path)
    if kind == "parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(CHUNK_SIZE, columns=_SCHEMA.names)
        return
    with gzip.open(path) if kind == "gzip" else path.open("rb") as file:
        start = file.peek(1)[:1]
        text = _Text(file)
        if start == b"{":
            yield from pa.json.open_json(
                text,
                read_options=pa.json.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
                parse_options=pa.json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore"),
            )
        else:
            yield from pa.csv.open_csv(
                text,
                read_options=pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(
                    column_types=_SCHEMA,
                    include_columns=_SCHEMA.names,
                    null_values=[""],
                    true_values=["true"],
                    false_values=["false"],
                ),
            )
        if text.last != b"\n":
            raise NotVerified("The file is truncated within a row.")


class _Text:
    """A file that remembers its last byte, once it has been read to its end."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.last = b""
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        content: bytes = self._file.read(size)
        self.last = content[-1:] or self.last
        return content

    def readable(self) -> bool:
        return True


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    return "parquet" if start == b"PAR1" else "gzip" if start[:2] == b"\x1f\x8b" else "text"


@contextmanager
def _read_errors(path: Path) -> Iterator[list[int]]:
    """Turns the readers' errors into NotVerified. The list holds the number of rows that were read before."""
    position = [0]
    try:
        yield position
    except pa.ArrowInvalid as error:
        message = " ".join(str(error).split())
        # JSON rows are counted from 0 within the block, CSV rows from 1 with the header, within the file.
        if found := re.search(r"in row (\d+)", message):
            message = f"Row {position[0] + int(found[1]):,}: {message[: found.start()].strip()}"
        elif found := re.search(r"Row #(\d+): ", message):
            message = f"Row {int(found[1]) - 2:,}: {message[found.end() :]}"
        else:
            message = f"{path.name} cannot be read beyond row {position[0]:,}: {message}"
        raise NotVerified(f"{message[:200]}.") from error
    except KeyError as error:
        raise NotVerified(f"{path.name} is not an export: {error}") from error
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise NotVerified(f"{path.name} is corrupt or truncated: {error}") from error
