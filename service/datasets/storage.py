"""Canonical storage of a dataset in the artifact store, and its readers. Workers import the readers.

    datasets/<fp[:2]>/<fp>/rows.parquet   id, source, sample (canonical JSON)
    datasets/<fp[:2]>/<fp>/ids.parquet    id, source; stays for results when the rows are deleted
    datasets/<fp[:2]>/<fp>/skipped.<id>.jsonl.gz    {"unit", "number", "reason"}: rows that an upload had and this dataset has not

`fp`, the fingerprint, is the sha256 of the canonical lines (`CanonicalRow.line`) in order: ids, sources and content count,
the upload's own format, blank lines and unknown fields do not.
"""

import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from service.datasets.rows.canonical import CanonicalRow
from service.datasets.rows.columns import CanonicalColumns
from service.datasets.values import NO_SOURCE, OTHER_SOURCES
from service.storage.artifacts import ArtifactStore

GROUP_ROWS = 4_096
# A group is cut short at this size: 4,096 rows of a megabyte each would not fit the memory.
_GROUP_BYTES = 32 * 2**20
_ID_BATCH_ROWS = 16_384
_SAMPLE_BATCH_ROWS = 256
_MAX_SOURCES = 1_000
_REPORT_BYTES = 2**16

_IDS_SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("source", pa.string())])
_KEY = re.compile(
    r"datasets/(?P<first>[0-9a-f]{2})/(?P<fingerprint>(?P=first)[0-9a-f]{62})/"
    r"(?:(?:rows|ids)\.parquet|skipped\.(?P<dataset>ds_[0-9a-f]{32})\.jsonl\.gz)(?:\.sum)?"
)
_ROWS_SCHEMA = _IDS_SCHEMA.append(pa.field("sample", pa.string(), nullable=False))


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, with either `messages`, and the `tools` that may be called in them, or `text`. `index` is its position, from 0.

    A message has `role` and `content` and, where there is something in them, `reasoning_content`, `tool_calls`, `tool_call_id`
    and `name`; `counts`, always false, marks an assistant message that is not learnt.
    """

    index: int
    id: str
    source: str | None
    messages: list[dict[str, Any]] | None
    text: str | None
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Content:
    """A converted upload, in local files that are not yet published.

    Attributes:
        byte_count: size of the canonical lines.
        detected: what was taken of the upload (`detected.Detection.result`).
        skipped: number of rows that could not be used, which the file `report` names, compressed with gzip.
    """

    fingerprint: str
    row_count: int
    byte_count: int
    sources: dict[str, int]
    rows: Path
    ids: Path
    detected: dict[str, Any] | None = None
    skipped: int = 0
    report: Path | None = None


def rows_key(fingerprint: str) -> str:
    return f"datasets/{fingerprint[:2]}/{fingerprint}/rows.parquet"


def ids_key(fingerprint: str) -> str:
    return f"datasets/{fingerprint[:2]}/{fingerprint}/ids.parquet"


def skipped_key(fingerprint: str, dataset_id: str) -> str:
    """Of one dataset, unlike the rows: others may have the same rows of other uploads."""
    return f"datasets/{fingerprint[:2]}/{fingerprint}/skipped.{dataset_id}.jsonl.gz"


def fingerprint_of(key: str) -> str | None:
    """The fingerprint of the dataset that a file belongs to; None if it belongs to none."""
    found = _KEY.fullmatch(key)
    return None if found is None else found["fingerprint"]


def dataset_of(key: str) -> str | None:
    """The id of the one dataset that a file belongs to; None if it belongs to all that have its content, or to none."""
    found = _KEY.fullmatch(key)
    return None if found is None else found["dataset"]


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

    def extend(self, columns: CanonicalColumns) -> None:
        """Appends rows that stand in columns, as a row group of their own."""
        self._flush()
        offsets = np.frombuffer(columns.lines.buffers()[1], np.int32)[columns.lines.offset :][: len(columns.lines) + 1]
        lines = memoryview(columns.lines.buffers()[2])[offsets[0] : offsets[-1]]
        self._digest.update(lines)
        self._row_count += len(columns.lines)
        self._byte_count += len(lines)
        for found in pc.value_counts(columns.sources).to_pylist():
            self._count_source(found["values"], found["counts"])
        self._write(columns.ids, columns.sources, columns.samples)

    def content(self) -> Content:
        """What was written; only after the writer has exited."""
        return Content(
            self._digest.hexdigest(), self._row_count, self._byte_count, self._sources, self._rows, self._ids
        )

    def _count_source(self, source: str | None, rows: int = 1) -> None:
        """The first thousand sources are counted by name: an upload may name as many as it has rows."""
        if source is None:
            name = NO_SOURCE
        elif source in self._sources or len(self._sources) < _MAX_SOURCES:
            name = source
        else:
            name = OTHER_SOURCES
        self._sources[name] = self._sources.get(name, 0) + rows

    def _flush(self) -> None:
        if not self._group:
            return
        ids = [row.id for row in self._group]
        sources = [row.source for row in self._group]
        samples = [row.sample for row in self._group]
        self._write(ids, sources, samples)
        self._group.clear()
        self._group_bytes = 0

    def _write(self, ids: Any, sources: Any, samples: Any) -> None:
        self._rows_writer.write_batch(pa.record_batch([ids, sources, samples], schema=_ROWS_SCHEMA))
        self._ids_writer.write_batch(pa.record_batch([ids, sources], schema=_IDS_SCHEMA))


def publish(store: ArtifactStore, content: Content, dataset_id: str | None = None) -> None:
    """Stores the content under its fingerprint, unless it is already there, undamaged; its report under the dataset's id."""
    if content.report is not None and dataset_id is not None:
        _move(store, content.report, skipped_key(content.fingerprint, dataset_id))
    # The rows come last: if they are there, so are the ids.
    for source, key in ((content.ids, ids_key(content.fingerprint)), (content.rows, rows_key(content.fingerprint))):
        if not store.is_whole(key):
            _move(store, source, key)


def _move(store: ArtifactStore, source: Path, key: str) -> None:
    with store.writing(key) as path:
        shutil.move(source, path)


def read_skipped(store: ArtifactStore, fingerprint: str, dataset_id: str) -> Generator[bytes]:
    """The report of a dataset that has one, decompressed, in pieces of up to 64 KiB.

    Raises (also while it is read):
        FileNotFoundError: it is not in the store; the dataset was deleted.
        ArtifactDamaged: it was set aside.
    """
    with store.open(skipped_key(fingerprint, dataset_id)) as file, gzip.GzipFile(fileobj=file) as report:
        while part := report.read(_REPORT_BYTES):
            yield part


@contextmanager
def open_parquet(store: ArtifactStore, key: str) -> Iterator[pq.ParquetFile]:
    """A file of the store, to be read a row group at a time.

    Raises:
        FileNotFoundError: it is not in the store.
    """
    with store.open(key) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
        yield parquet


def _samples(indices: Iterable[int], rows: pa.RecordBatch | pa.Table) -> Iterator[Sample]:
    columns = [rows.column(name).to_pylist() for name in ("id", "source", "sample")]
    # Not strict: the indices may go on past the rows. The columns come first, so that no index is consumed in vain.
    for id, source, sample, index in zip(*columns, indices, strict=False):
        content = json.loads(sample)
        yield Sample(index, id, source, content.get("messages"), content.get("text"), content.get("tools"))


def group_sizes(store: ArtifactStore, fingerprint: str) -> tuple[list[int], list[int]]:
    """Rows, and bytes before compression, of each row group in order.

    Raises:
        FileNotFoundError: the rows are not in the store; the dataset was deleted.
    """
    with open_parquet(store, rows_key(fingerprint)) as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        return [group.num_rows for group in groups], [group.total_byte_size for group in groups]


def iter_samples(store: ArtifactStore, fingerprint: str, start: int = 0, stop: int | None = None) -> Iterator[Sample]:
    """The samples [start, stop), to the last one by default, in order, streamed; only their row groups are read.

    Raises:
        FileNotFoundError: the rows are not in the store; the dataset was deleted.
    """
    with open_parquet(store, rows_key(fingerprint)) as parquet:
        yield from _samples_between(parquet, start, stop)


def samples_of(content: Content) -> Iterator[Sample]:
    """The same of content that is not published."""
    with pq.ParquetFile(content.rows, pre_buffer=False) as parquet:
        yield from _samples_between(parquet, 0, None)


def _samples_between(parquet: pq.ParquetFile, start: int, stop: int | None) -> Iterator[Sample]:
    starts = group_starts(parquet)
    stop = int(starts[-1]) if stop is None else stop
    if start >= stop:
        return
    first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
    place = int(starts[first])
    for batch in parquet.iter_batches(_SAMPLE_BATCH_ROWS, row_groups=range(first, last + 1), use_threads=False):
        low, high = max(start - place, 0), min(stop - place, len(batch))
        if low < high:
            yield from _samples(count(place + low), batch.slice(low, high - low))
        place += len(batch)


def iter_ids(store: ArtifactStore, fingerprint: str) -> Iterator[tuple[list[str], list[str | None]]]:
    """Ids and sources in order, in batches of 16,384 rows.

    Raises:
        FileNotFoundError: no dataset of this fingerprint is in the store.
    """
    with open_parquet(store, ids_key(fingerprint)) as parquet:
        for batch in parquet.iter_batches(_ID_BATCH_ROWS, use_threads=False):
            yield batch.column("id").to_pylist(), batch.column("source").to_pylist()


def read_ids(store: ArtifactStore, fingerprint: str, start: int, stop: int) -> tuple[list[str], list[str | None]]:
    """Ids and sources of the rows [start, stop), cut at the end of the dataset; only the row groups concerned are read.

    Raises:
        FileNotFoundError: no dataset of this fingerprint is in the store.
    """
    with open_parquet(store, ids_key(fingerprint)) as parquet:
        starts = group_starts(parquet)
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
    with open_parquet(store, ids_key(fingerprint)) as parquet:
        starts = group_starts(parquet)
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
    with open_parquet(store, rows_key(fingerprint)) as parquet:
        starts = group_starts(parquet)
        wanted = np.unique(np.asarray(indices, dtype=np.int64))
        if wanted.size and not (wanted[0] >= 0 and wanted[-1] < starts[-1]):
            raise IndexError(f"an index is not in the dataset, which has {starts[-1]} rows")
        group_of = np.searchsorted(starts, wanted, side="right") - 1
        for group in np.unique(group_of):
            rows = wanted[group_of == group]
            table = parquet.read_row_group(int(group), use_threads=False).take(rows - starts[group])
            found.update((sample.index, sample) for sample in _samples(rows.tolist(), table))
    return [found[index] for index in indices]


def group_starts(parquet: pq.ParquetFile) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The index of each row group's first row, and the row count at the end."""
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    return np.cumsum([0, *sizes], dtype=np.int64)
