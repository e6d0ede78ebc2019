"""Converts an upload to canonical files: every row checked, every fault named by its place, all or nothing kept."""

from array import array
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.datasets.formats import Form, InvalidRow, canonical, columns, shown
from service.datasets.reader import invalid_file, open_upload
from service.datasets.storage import Content, ContentWriter
from service.errors import Unprocessable
from service.settings import UploadSettings

MAX_FAULTS = 20
_SUSPECTS_AT_ONCE = 4_096

# A place such as "line 17", and what is wrong there.
Fault = tuple[str, str]


def convert(file: IO[bytes], form: Form, limits: UploadSettings, folder: Path) -> Content:
    """Reads the upload once and writes its canonical files to the folder.

    Memory holds one row group of content and, for the ids' uniqueness, 16 bytes a row (32 while they are sorted).

    Raises:
        TooLarge: a budget is spent.
        Unprocessable: the file cannot be read (`invalid_file`), or rows of it cannot be used (`invalid_rows`).
    """
    upload = open_upload(file, columns(form), limits)
    places, hashes = array("q"), array("q")
    faults: list[Fault] = []
    with closing(upload.rows), ContentWriter(folder) as writer:
        for number, fields in upload.rows:
            places.append(number)
            try:
                if isinstance(fields, InvalidRow):
                    raise fields
                row = canonical(fields, len(places) - 1, form)
            except InvalidRow as fault:
                faults.append((f"{upload.unit} {number}", str(fault)))
                if len(faults) == MAX_FAULTS:
                    break
                continue
            writer.append(row)
            hashes.append(hash(row.id))
    if faults:
        raise _invalid_rows(faults)
    content = writer.content()
    if content.row_count == 0:
        raise invalid_file("The upload has no rows; send JSONL, gzipped JSONL or Parquet with at least one")
    for id, first, repeat in islice(repeated_ids(content.ids, hashes), MAX_FAULTS):
        message = f"has the id {shown(id)} of {upload.unit} {places[first]}; ids must be unique"
        faults.append((f"{upload.unit} {places[repeat]}", message + " (a row without one has its number, from 0)"))
    if faults:
        raise _invalid_rows(faults)
    return content


def repeated_ids(ids: Path, hashes: "array[int]") -> Iterator[tuple[str, int, int]]:
    """Each id that a row repeats, with the index of its first row and of the repeat.

    Equal hashes only arouse suspicion; the ids themselves decide, read again for a few thousand suspects at a time.
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


def _invalid_rows(faults: list[Fault]) -> Unprocessable:
    more = ", and more may follow" if len(faults) == MAX_FAULTS else ""
    place, message = faults[0]
    return Unprocessable(
        f"{len(faults)} rows cannot be used{more}; nothing was kept. The first: {place} {message}",
        param=place,
        errors=[{"param": place, "message": message} for place, message in faults],
        code="invalid_rows",
    )
