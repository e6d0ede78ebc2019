"""Canonical storage of a dataset in the artifact store, and its readers. Workers import the readers.

    datasets/<fp[:2]>/<fp>/rows.parquet   id, source, sample (canonical JSON)
    datasets/<fp[:2]>/<fp>/ids.parquet    id, source; stays for results when the rows are deleted

`fp`, the fingerprint, is the sha256 of the canonical lines (`CanonicalRow.line`) in order: ids, sources and content count,
the upload's own format, blank lines and unknown fields do not.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.artifacts import ArtifactStore
from service.datasets.formats import NO_SOURCE, OTHER_SOURCES, CanonicalRow

GROUP_ROWS = 4_096
# A group is cut short at this size: 4,096 rows of a megabyte each would not fit the memory.
_GROUP_BYTES = 32 * 2**20
_ID_BATCH_ROWS = 16_384
_SAMPLE_BATCH_ROWS = 256
_MAX_SOURCES = 1_000

_IDS_SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("source", pa.string())])
_KEY = re.compile(r"datasets/(?P<first>[0-9a-f]{2})/(?P<fingerprint>(?P=first)[0-9a-f]{62})/(rows|ids)\.parquet")
_ROWS_SCHEMA = _IDS_SCHEMA.append(pa.field("sample", pa.string(), nullable=False))


@dataclass(frozen=True, slots=True)
class Sample:
    """One row. Either `messages`, each {"role", "content"}, or `text` is there. `index` is its place, from 0."""

    index: int
    id: str
    source: str | None
    messages: list[dict[str, str]] | None
    text: str | None


@dataclass(frozen=True, slots=True)
class Content:
    """A converted upload, in local files that are not yet published. `byte_count` is that of the canonical lines."""

    fingerprint: str
    row_count: int
    byte_count: int
    sources: dict[str, int]
    rows: Path
    ids: Path


def rows_key(fingerprint: str) -> str:
    return f"datasets/{fingerprint[:2]}/{fingerprint}/rows.parquet"


def ids_key(fingerprint: str) -> str:
    return f"datasets/{fingerprint[:2]}/{fingerprint}/ids.parquet"


def fingerprint_of(key: str) -> str | None:
    """Of the dataset that the file belongs to; None where it is no dataset's."""
    found = _KEY.fullmatch(key)
    return None if found is None else found["fingerprint"]


class ContentWriter:
    """Writes canonical rows to two Parquet files in a folder, one row group in memory at a time."""

    def __init__(self, folder: Path) -> None:
        self._rows, self._ids = folder / "rows.parquet", folder / "ids.parquet"
        self._digest = hashlib.sha256()
        self._group: list[CanonicalRow] = []
        self._group_bytes = 0
        self._row_count = 0
        self._byte_count = 0
        self._sources: dict[str, int] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        options = {"compression": "zstd", "use_dictionary": ["source"], "write_statistics": False}
        self._rows_writer = self._open.enter_context(pq.ParquetWriter(self._rows, _ROWS_SCHEMA, **options))
        self._ids_writer = self._open.enter_context(pq.ParquetWriter(self._ids, _IDS_SCHEMA, **options))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        self._open.close()

    def append(self, row: CanonicalRow) -> None:
        line = row.line()
        self._digest.update(line)
        self._row_count += 1
        self._byte_count += len(line)
        self._count_source(row.source)
        self._group.append(row)
        self._group_bytes += len(line)
        if len(self._group) == GROUP_ROWS or self._group_bytes >= _GROUP_BYTES:
            self._flush()

    def content(self) -> Content:
        """What was written, after the writer was left."""
        return Content(
            self._digest.hexdigest(), self._row_count, self._byte_count, self._sources, self._rows, self._ids
        )

    def _count_source(self, source: str | None) -> None:
        """The first thousand sources are counted by name: an upload may name as many as it has rows."""
        if source is None:
            name = NO_SOURCE
        elif source in self._sources or len(self._sources) < _MAX_SOURCES:
            name = source
        else:
            name = OTHER_SOURCES
        self._sources[name] = self._sources.get(name, 0) + 1

    def _flush(self) -> None:
        if not self._group:
            return
        ids = [row.id for row in self._group]
        sources = [row.source for row in self._group]
        samples = [row.sample for row in self._group]
        self._rows_writer.write_batch(pa.record_batch([ids, sources, samples], schema=_ROWS_SCHEMA))
        self._ids_writer.write_batch(pa.record_batch([ids, sources], schema=_IDS_SCHEMA))
        self._group.clear()
        self._group_bytes = 0


def publish(store: ArtifactStore, content: Content) -> None:
    """Puts the content where its fingerprint says; equal content that is there already is left alone."""
    # The rows come last: where they are, the ids are.
    for source, key in ((content.ids, ids_key(content.fingerprint)), (content.rows, rows_key(content.fingerprint))):
        if not store.exists(key):
            with store.writing(key) as path:
                shutil.move(source, path)


@contextmanager
def _parquet(store: ArtifactStore, key: str) -> Iterator[pq.ParquetFile]:
    with store.open(key) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
        yield parquet


def _samples(indices: Iterable[int], rows: pa.RecordBatch | pa.Table) -> Iterator[Sample]:
    columns = [rows.column(name).to_pylist() for name in ("id", "source", "sample")]
    # Not strict: the indices may go on past the rows. The columns are asked first, so that no index is lost between.
    for id, source, sample, index in zip(*columns, indices, strict=False):
        content = json.loads(sample)
        yield Sample(index, id, source, content.get("messages"), content.get("text"))


def iter_samples(store: ArtifactStore, fingerprint: str) -> Iterator[Sample]:
    """Every sample in order, streamed.

    Raises:
        FileNotFoundError: the rows are not in the store; the dataset was deleted.
    """
    index = count()
    with _parquet(store, rows_key(fingerprint)) as parquet:
        for batch in parquet.iter_batches(_SAMPLE_BATCH_ROWS, use_threads=False):
            yield from _samples(index, batch)


def iter_ids(store: ArtifactStore, fingerprint: str) -> Iterator[tuple[list[str], list[str | None]]]:
    """Ids and sources in order, in batches of 16,384 rows.

    Raises:
        FileNotFoundError: no dataset of this fingerprint is in the store.
    """
    with _parquet(store, ids_key(fingerprint)) as parquet:
        for batch in parquet.iter_batches(_ID_BATCH_ROWS, use_threads=False):
            yield batch.column("id").to_pylist(), batch.column("source").to_pylist()


def read_ids(store: ArtifactStore, fingerprint: str, start: int, stop: int) -> tuple[list[str], list[str | None]]:
    """Ids and sources of the rows [start, stop), cut at the end of the dataset; only the row groups concerned are read.

    Raises:
        FileNotFoundError: no dataset of this fingerprint is in the store.
    """
    with _parquet(store, ids_key(fingerprint)) as parquet:
        starts = _group_starts(parquet)
        stop = min(stop, int(starts[-1]))
        if not 0 <= start < stop:
            return [], []
        table = _rows_of(parquet, starts, start, stop)
        return table.column("id").to_pylist(), table.column("source").to_pylist()


def iter_id_tables(store: ArtifactStore, fingerprint: str, start: int, rows: int) -> Iterator[pa.Table]:
    """Columns `id` and `source` from row `start` on, in tables that end where a multiple of `rows` does.

    Raises:
        FileNotFoundError: no dataset of this fingerprint is in the store.
    """
    with _parquet(store, ids_key(fingerprint)) as parquet:
        starts = _group_starts(parquet)
        while start < starts[-1]:
            stop = min((start // rows + 1) * rows, int(starts[-1]))
            yield _rows_of(parquet, starts, start, stop)
            start = stop


def _rows_of(
    parquet: pq.ParquetFile, starts: np.ndarray[tuple[int], np.dtype[np.int64]], start: int, stop: int
) -> pa.Table:
    """The rows [start, stop), which are there; only their row groups are read."""
    first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
    table = parquet.read_row_groups(range(first, last + 1), use_threads=False)
    return table.slice(start - int(starts[first]), stop - start)


def read_samples(store: ArtifactStore, fingerprint: str, indices: Sequence[int]) -> list[Sample]:
    """The samples at the indices, in their order. Each row group concerned is read once.

    Raises:
        FileNotFoundError: the rows are not in the store; the dataset was deleted.
        IndexError: an index is not in the dataset.
    """
    found: dict[int, Sample] = {}
    with _parquet(store, rows_key(fingerprint)) as parquet:
        starts = _group_starts(parquet)
        wanted = np.unique(np.asarray(indices, dtype=np.int64))
        if wanted.size and not (wanted[0] >= 0 and wanted[-1] < starts[-1]):
            raise IndexError(f"an index is not in the dataset, which has {starts[-1]} rows")
        group_of = np.searchsorted(starts, wanted, side="right") - 1
        for group in np.unique(group_of):
            rows = wanted[group_of == group]
            table = parquet.read_row_group(int(group), use_threads=False).take(rows - starts[group])
            found.update((sample.index, sample) for sample in _samples(rows.tolist(), table))
    return [found[index] for index in indices]


def _group_starts(parquet: pq.ParquetFile) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The index of each row group's first row, and the row count at the end."""
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    return np.cumsum([0, *sizes], dtype=np.int64)
