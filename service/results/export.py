"""Rows of results in batches of columns, for streams.

A stream takes a session for each batch and gives it back before the batch is sent: a slow client holds no connection, and
one that goes away leaves nothing open.
"""

import ctypes
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from threading import BoundedSemaphore
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.artifacts import ArtifactStore
from service.database import Sessions
from service.datasets import storage
from service.errors import Unavailable
from service.results import repository
from service.results.formats import ByteStream, batch_of
from service.results.tables import CHUNK_SIZE

# Content of the pool that one batch holds; on the way to bytes it is there a dozen times. Each batch of a selection reads the
# whole pool, so it is larger; the estimate for it is made from the pool's mean row.
BATCH_BYTES = 2**19
SELECTED_BATCH_BYTES = 2 * 2**20
# A stream that waits for its client holds one batch of bytes, one that makes a batch several times as much.
MOST_STREAMS = 32
_MOST_MAKING = 1
_LOOK_ROWS = 256  # a row may have a megabyte
# Arrow's own allocator keeps what was freed by each thread for that thread: twice the memory here, and no faster.
pa.set_memory_pool(pa.system_memory_pool())
# glibc moves this up to 32 MB by itself, and from then on what buffers of megabytes leave is not given back to the system.
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 2**18
if hasattr(_libc := ctypes.CDLL(None), "mallopt"):
    _libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)

# Lists or arrays by name, all of one length.
Columns = dict[str, Any]

_streams = BoundedSemaphore(MOST_STREAMS)
_making: RunVar[CapacityLimiter] = RunVar("making_of_batches")


class ResultStream(StreamingResponse):
    """Streams bytes from a generator, and closes it whatever happens."""

    def __init__(self, content: ByteStream, *, media_type: str, headers: dict[str, str] | None = None) -> None:
        self._content = content
        super().__init__((), media_type=media_type, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _streams.acquire(blocking=False):
            raise Unavailable(
                f"This server sends {MOST_STREAMS} results at a time, its most. Try again soon.",
                code="too_many_streams",
                headers={"Retry-After": "5"},
            )
        try:
            # What fails on the way to the first bytes still gets its own status: none has been sent yet.
            first = await self._next()
            self.body_iterator = self._rest(first)
            await super().__call__(scope, receive, send)
        finally:
            self._content.close()
            _streams.release()

    async def _next(self) -> bytes:
        """The next bytes, empty at the end. Its threads are few, and not those that answer other requests."""
        try:
            limiter = _making.get()
        except LookupError:
            limiter = CapacityLimiter(_MOST_MAKING)
            _making.set(limiter)
        return await run_sync(next, self._content, b"", limiter=limiter)

    async def _rest(self, part: bytes) -> AsyncIterator[bytes]:
        while part:
            yield part
            part = await self._next()


class Rows:
    """The rows of one succeeded job, read batch by batch."""

    def __init__(self, sessions: Sessions, store: ArtifactStore, job: repository.Job) -> None:
        self._sessions = sessions
        self._store = store
        self._job = job
        self._pool = job.pool

    def weights(self, start: int = 0) -> Iterator[pa.RecordBatch]:
        """Every sample from `start` on, in pool order, a chunk at a time."""
        return map(batch_of, self._weights(start))

    def all(self) -> Iterator[pa.RecordBatch]:
        """Every sample in pool order, with its rank where it was selected."""
        for columns in self._weights():
            yield batch_of(columns | self._selection(columns["index"]))

    def all_with_content(self) -> Iterator[pa.RecordBatch]:
        """Like `all`, with the samples' content; a batch ends where its content reaches BATCH_BYTES."""
        kinds = content_kinds(self._store, self._pool.fingerprint)
        for samples in _batches(storage.iter_samples(self._store, self._pool.fingerprint)):
            columns = self._columns(samples[0].index, [s.id for s in samples], [s.source for s in samples])
            yield batch_of(columns | self._selection(columns["index"]) | _content(samples, kinds))

    def selected(self) -> Iterator[pa.RecordBatch]:
        """The selected samples in rank order."""
        return map(batch_of, self._selected(CHUNK_SIZE))

    def selected_with_content(self) -> Iterator[pa.RecordBatch]:
        """Like `selected`, with the samples' content; as many a batch as hold SELECTED_BATCH_BYTES at the pool's mean size."""
        kinds = content_kinds(self._store, self._pool.fingerprint)
        rows = SELECTED_BATCH_BYTES * self._pool.row_count // self._pool.byte_count
        for columns in self._selected(min(max(rows, 1), CHUNK_SIZE)):
            samples = storage.read_samples(self._store, self._pool.fingerprint, columns["index"])
            yield batch_of(columns | _content(samples, kinds))

    def _weights(self, start: int = 0) -> Iterator[Columns]:
        for rows in storage.iter_id_tables(self._store, self._pool.fingerprint, start, CHUNK_SIZE):
            ids, sources = (rows.column(name).combine_chunks() for name in ("id", "source"))
            yield self._columns(start, ids, sources)
            start += rows.num_rows

    def _columns(self, start: int, ids: Sequence[str], sources: Sequence[str | None]) -> Columns:
        """The columns of samples [start, start + len(ids)), whose ids and sources are given."""
        with self._sessions() as session:
            found = repository.weight_arrays(session, self._job.id, start, start + len(ids))
        return {
            "index": np.arange(start, start + len(ids)),
            "id": ids,
            "source": sources,
            "influence": found.influence,
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
                rows = repository.selected_after(session, self._job.id, after, batch_rows)
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
        size += sum(len(m["content"]) for m in sample.messages) if sample.messages else len(sample.text or "")
        if len(batch) == CHUNK_SIZE or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def content_kinds(store: ArtifactStore, fingerprint: str) -> list[str]:
    """The columns that the pool's content needs: `messages`, `text`, or both where the upload mixed them.

    A file's columns must stand before its first row is written, hence this look through the rows, at about 1 GB a second.
    """
    found: set[str] = set()
    with store.open(storage.rows_key(fingerprint)) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
        for batch in parquet.iter_batches(_LOOK_ROWS, columns=["sample"], use_threads=False):
            is_messages = pc.starts_with(batch.column("sample"), '{"messages"')
            found.update("messages" if value else "text" for value in pc.unique(is_messages).to_pylist())
            if len(found) == 2:
                break
    return sorted(found)


def _content(samples: Sequence[storage.Sample], kinds: Sequence[str]) -> Columns:
    return {kind: [getattr(sample, kind) for sample in samples] for kind in kinds}
