"""Converts an upload to canonical files: checks every row, tells of each bad one, and keeps all rows, the good ones or none."""

import hashlib
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.datasets.bad_rows import BadRows, OnBadRow
from service.datasets.detected import Detection
from service.datasets.files.batches import Batch, NumberedRow
from service.datasets.files.budget import invalid_file, too_long
from service.datasets.files.reader import Upload, open_upload
from service.datasets.rows.canonical import CanonicalRow, canonical
from service.datasets.rows.columns import CanonicalColumns, canonical_columns
from service.datasets.rows.forms import Form
from service.datasets.rows.options import RowOptions
from service.datasets.rows.renderer import RenderedRow, rendered
from service.datasets.rows.template import Rendered
from service.datasets.storage import Content, ContentWriter
from service.datasets.values import InvalidRow, quoted, shown
from service.http.errors import Unprocessable
from service.settings import UploadSettings

_SUSPECTS_AT_ONCE = 4_096
_REREAD_ROWS = 256

Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]


def convert(
    file: IO[bytes],
    options: RowOptions,
    limits: UploadSettings,
    folder: Path,
    name: str = "",
    on_bad_row: OnBadRow = OnBadRow.REFUSE,
    report: Callable[[int], None] | None = None,
) -> Content:
    """Reads the upload once and writes its canonical files to the folder; `name` tells what its content leaves open.

    `report` gets the number of rows read, now and then.

    Memory holds one row group of content and, for the ids' uniqueness, 16 bytes a row (33 while they are sorted and compared).

    Raises:
        TooLarge: a budget is exceeded.
        Unprocessable: the file cannot be read (`invalid_file`), or rows cannot be used (`invalid_rows`): all of them, or any
            that are not to be skipped.
    """
    sha256 = sha256_of(file).hex()
    upload = open_upload(file, name, options.wanted, limits, text=options.form is Form.TEXT)
    content = convert_rows(upload, options, limits, folder, on_bad_row, report)
    return replace(content, detected={**(content.detected or {}), "sha256": sha256})


def sha256_of(file: IO[bytes]) -> bytes:
    """Of all that is in the file, which is at its beginning afterwards."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").digest()  # type: ignore[arg-type]  # every file here has `readinto`
    file.seek(0)
    return digest


def convert_rows(
    upload: Upload,
    options: RowOptions,
    limits: UploadSettings,
    folder: Path,
    on_bad_row: OnBadRow = OnBadRow.REFUSE,
    report: Callable[[int], None] | None = None,
) -> Content:
    """As `convert`, of an upload that is open."""
    kept, detection = _Kept(), Detection()
    with BadRows(folder, upload.unit, on_bad_row) as bad:
        with closing(upload.parts), closing(_parts(upload, options, limits)) as parts, ContentWriter(folder) as writer:
            for part in parts:
                if report is not None:
                    report(kept.count + bad.count)
                if not isinstance(part, Batch):
                    rows: Iterable[NumberedRow | RenderedRow] = [part]
                elif (found := _in_columns(part, kept.count + bad.count, options, limits)) is not None:
                    writer.extend(found)
                    kept.extend(part.first, found)
                    for taken, count in found.taken:
                        detection.add(taken, count)
                    continue
                else:
                    rows = part.rows(limits.max_row_bytes)
                for number, fields in rows:
                    try:
                        row = _canonical(fields, kept.count + bad.count, options, upload, limits)
                    except InvalidRow as fault:
                        bad.add(number, str(fault))
                    else:
                        writer.append(row)
                        kept.append(number, row)
                        detection.add(row.taken)
        bad.check(kept.count)
        if not kept.count:
            raise invalid_file("The upload has no rows; send a file with at least one.")
        _check_mapping(options, detection)
        content = writer.content()
        repeats = _repeats(content, kept, bad, upload.unit)
        bad.check(kept.count)
        if repeats is not None:
            content = _without(repeats, content, folder / "unique")
    detection.leave(_unread(upload, options))
    detected = detection.result(upload.container, upload.compression)
    return replace(content, detected=detected, skipped=bad.count, report=bad.path if bad.count else None)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Of each row that was kept its number in the file and the hash of its id."""

    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    hashes: "array[int]" = field(default_factory=lambda: array("q"))

    @property
    def count(self) -> int:
        return len(self.numbers)

    def append(self, number: int, row: CanonicalRow) -> None:
        self.numbers.append(number)
        self.hashes.append(hash(row.id))

    def extend(self, first: int, found: CanonicalColumns) -> None:
        self.numbers.extend(range(first, first + len(found.ids)))
        self.hashes.extend(map(hash, found.ids.to_pylist()))


def _parts(upload: Upload, options: RowOptions, limits: UploadSettings) -> Generator[NumberedRow | RenderedRow | Batch]:
    if options.template is None:
        yield from upload.parts
    else:
        yield from rendered(upload.parts, options.template, limits)


def _canonical(
    fields: dict[str, Any] | Rendered | InvalidRow,
    number: int,
    options: RowOptions,
    upload: Upload,
    limits: UploadSettings,
) -> CanonicalRow:
    if isinstance(fields, InvalidRow):
        raise fields
    row = canonical(fields, number, options)
    # Of other rows the lines are limited as they are read.
    if (upload.unit == "row" or isinstance(fields, Rendered)) and len(row.line()) > limits.max_row_bytes:
        raise too_long(limits.max_row_bytes)
    return row


def _repeats(content: Content, kept: _Kept, bad: BadRows, unit: str) -> Mask | None:
    """Which rows have the id of an earlier one, and are bad therefore; None if none has."""
    found: Mask | None = None
    for id, first, repeat in repeated_ids(content.ids, kept.hashes):
        reason = f"has the id {quoted(id)} of {unit} {kept.numbers[first]}; ids must be unique"
        bad.add(kept.numbers[repeat], reason + " (a row without an id uses its number, from 0)")
        if found is None:
            found = np.zeros(kept.count, np.bool_)
        found[repeat] = True
    return found


def _without(left_out: Mask, content: Content, folder: Path) -> Content:
    """The other rows of the content, written again to a folder of their own."""
    folder.mkdir(exist_ok=True)
    start = 0
    with pq.ParquetFile(content.rows) as parquet, ContentWriter(folder) as writer:
        for batch in parquet.iter_batches(_REREAD_ROWS, use_threads=False):
            rows = batch.filter(pa.array(~left_out[start : start + batch.num_rows]))
            start += batch.num_rows
            for row in zip(*(column.to_pylist() for column in rows.columns), strict=True):
                writer.append(CanonicalRow(*row))
    return writer.content()


def _check_mapping(options: RowOptions, detection: Detection) -> None:
    """Whether each column that the caller named was there; else a slip in its name would leave out, say, every source."""
    for slot, column in options.columns:
        if shown(column) not in detection.columns:
            raise Unprocessable(
                f"columns: no row has a value in {quoted(column)}, which is to be the {slot}; name another column, or leave"
                f" {slot} out.",
                param="columns",
            )


def _unread(upload: Upload, options: RowOptions) -> Iterator[str]:
    """What the file has beside the rows, and the columns that no row could tell of, for they were not read."""
    yield from upload.beside
    wanted = options.wanted
    if wanted is not None and not set(wanted).isdisjoint(upload.names):
        yield from (name for name in upload.names if name not in wanted)


def _in_columns(batch: Batch, start: int, options: RowOptions, limits: UploadSettings) -> CanonicalColumns | None:
    return None if batch.faults else canonical_columns(batch.columns, start, options, limits.max_row_bytes)


def repeated_ids(ids: Path, hashes: "array[int]") -> Iterator[tuple[str, int, int]]:
    """Each id that a row repeats, with the index of its first row and of the repeat.

    Equal hashes only arouse suspicion; the ids themselves decide, reread for a few thousand suspects at a time.
    """
    hash_of = np.frombuffer(hashes, dtype=np.int64)
    order = np.argsort(hash_of, kind="stable")
    in_order = hash_of[order]
    repeats = np.sort(order[1:][in_order[1:] == in_order[:-1]])
    suspects, first_repeat = np.unique(hash_of[repeats], return_index=True)
    suspects = suspects[np.argsort(first_repeat)]
    for i in range(0, len(suspects), _SUSPECTS_AT_ONCE):
        indices = np.flatnonzero(np.isin(hash_of, suspects[i : i + _SUSPECTS_AT_ONCE]))
        first: dict[str, int] = {}
        for index, id in _read(ids, indices):
            if first.setdefault(id, index) != index:
                yield id, first[id], index


def _read(ids: Path, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Iterator[tuple[int, str]]:
    """The ids at the sorted indices, streamed."""
    start = 0
    with pq.ParquetFile(ids) as parquet:
        for batch in parquet.iter_batches(columns=["id"], use_threads=False):
            low, high = np.searchsorted(indices, [start, start + batch.num_rows])
            here = indices[low:high]
            yield from zip(here.tolist(), batch.column("id").take(pa.array(here - start)).to_pylist(), strict=True)
            start += batch.num_rows
