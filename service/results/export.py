"""Rows of results in batches of columns, for streams.

A stream takes a session for each batch and releases it before the batch is sent: a slow client holds no connection, and one
that disconnects leaves nothing open.
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from service.datasets import storage
from service.db.engine import Sessions
from service.results import content, repository
from service.results.formats import Format, batch_of, masked
from service.results.service import FinishedJob
from service.storage.artifacts import ArtifactStore
from winnow.merkle import CHUNK_SIZE

# Bytes of content per batch, which takes a dozen times as much memory while it is encoded. Each batch of a selection reads the
# whole pool, so it is larger; its size is estimated from the pool's mean row.
BATCH_BYTES = 2**19
SELECTED_BATCH_BYTES = 2 * 2**20
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 2**18

# Lists or arrays by name, all of one length.
Columns = dict[str, Any]


def bound_memory() -> None:
    """Makes a process that serves streams return freed memory to the system.

    Arrow's own allocator keeps freed memory per thread: twice the memory here, and no faster. And glibc raises its threshold for
    mapping a buffer to 32 MB, after which freed buffers of megabytes are not returned.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


class Rows:
    """The rows of one succeeded job, read batch by batch."""

    def __init__(self, sessions: Sessions, store: ArtifactStore, job: FinishedJob) -> None:
        self._sessions = sessions
        self._store = store
        self._job = job
        self._pool = job.pool

    def weights(self, start: int = 0) -> Iterator[pa.RecordBatch]:
        """Every sample from `start` on, in pool order, a chunk at a time."""
        return map(batch_of, self._weights(start))

    def batches(self, format: Format, selected_only: bool, include: str | None) -> Iterator[pa.RecordBatch]:
        """Those of an export."""
        if include is None:
            return self.selected() if selected_only else self.all()
        return self.selected_with_content(format) if selected_only else self.all_with_content(format)

    def all(self) -> Iterator[pa.RecordBatch]:
        """Every sample in pool order, with its rank where it was selected."""
        for columns in self._weights():
            yield batch_of(columns | self._selection(columns["index"]))

    def all_with_content(self, format: Format) -> Iterator[pa.RecordBatch]:
        """Like `all`, with the samples' content; a batch ends where its content reaches BATCH_BYTES."""
        layout = content.layout(self._store, self._pool.fingerprint)
        for samples in _batches(storage.iter_samples(self._store, self._pool.fingerprint)):
            columns = self._columns(samples[0].index, [s.id for s in samples], [s.source for s in samples])
            yield batch_of(columns | self._selection(columns["index"]) | layout.content(samples, format))

    def selected(self) -> Iterator[pa.RecordBatch]:
        """The selected samples in rank order."""
        return map(batch_of, self._selected(CHUNK_SIZE))

    def selected_with_content(self, format: Format) -> Iterator[pa.RecordBatch]:
        """Like `selected`, with the samples' content; as many a batch as hold SELECTED_BATCH_BYTES at the pool's mean size."""
        layout = content.layout(self._store, self._pool.fingerprint)
        for columns in self._selected(self._rows_a_batch()):
            samples = storage.read_samples(self._store, self._pool.fingerprint, columns["index"])
            yield batch_of(columns | layout.content(samples, format))

    def selected_in_pool_order(self) -> Iterator[tuple[storage.Sample, float]]:
        """The selected samples and their weights; each row group of the pool is read once, or a few times if rows are large."""
        for start in range(0, self._pool.row_count, CHUNK_SIZE):
            with self._sessions() as session:
                found = repository.selected_between(session, self._job.id, start, start + CHUNK_SIZE)
            indices = list(found)
            for first in range(0, len(indices), self._rows_a_batch()):
                batch = indices[first : first + self._rows_a_batch()]
                for sample in storage.read_samples(self._store, self._pool.fingerprint, batch):
                    yield sample, found[sample.index]

    def _rows_a_batch(self) -> int:
        """As many of a selection as hold SELECTED_BATCH_BYTES at the pool's mean size."""
        return min(max(SELECTED_BATCH_BYTES * self._pool.row_count // self._pool.byte_count, 1), CHUNK_SIZE)

    def _weights(self, start: int = 0) -> Iterator[Columns]:
        for rows in storage.iter_id_tables(self._store, self._pool.fingerprint, start, CHUNK_SIZE):
            ids, sources = (rows.column(name).combine_chunks() for name in ("id", "source"))
            yield self._columns(start, ids, sources)
            start += rows.num_rows

    def _columns(self, start: int, ids: Sequence[str], sources: Sequence[str | None]) -> Columns:
        """The columns of samples [start, start + len(ids)), whose ids and sources are given."""
        with self._sessions() as session:
            found = repository.weights(session, self._job.id, start, start + len(ids))
        return {
            "index": np.arange(start, start + len(ids)),
            "id": ids,
            "source": sources,
            "influence": masked(found.influence),
            "weight": found.weight,
            "exact": found.exact,
        }

    def _selection(self, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Columns:
        start = int(indices[0])
        rank = np.full(len(indices), -1)
        with self._sessions() as session:
            for index, taken in repository.ranks(session, self._job.id, start, start + len(indices)).items():
                rank[index - start] = taken
        return {"selected": rank >= 0, "rank": pa.array(rank, mask=rank < 0)}

    def _selected(self, batch_rows: int) -> Iterator[Columns]:
        after = -1
        while True:
            with self._sessions() as session:
                rows, _ = repository.selected_after(session, self._job.id, after, batch_rows)
            if not rows:
                return
            yield {
                "index": [row.sample_index for row in rows],
                "id": [row.sample_id for row in rows],
                "source": [row.source for row in rows],
                "influence": [row.influence for row in rows],
                "weight": [row.weight for row in rows],
                "exact": [row.exact for row in rows],
                "selected": [True] * len(rows),
                "rank": [row.rank for row in rows],
            }
            after = rows[-1].rank


def _batches(samples: Iterable[storage.Sample]) -> Iterator[list[storage.Sample]]:
    """Runs of samples that end at CHUNK_SIZE, or where their content reaches BATCH_BYTES."""
    batch: list[storage.Sample] = []
    size = 0
    for sample in samples:
        batch.append(sample)
        size += content.size(sample)
        if len(batch) == CHUNK_SIZE or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
