"""Rows of results in batches of columns, for streams.

A stream takes a session for each batch and gives it back before the batch is sent: a slow client holds no connection, and
one that goes away leaves nothing open.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import pyarrow.compute as pc
import pyarrow.parquet as pq
from anyio.to_thread import run_sync
from starlette.concurrency import iterate_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.artifacts import ArtifactStore
from service.database import Sessions
from service.datasets import storage
from service.results import repository
from service.results.formats import ByteStream, Columns
from service.results.tables import CHUNK_SIZE

# Content of the pool that one batch holds; the estimate for a selection is made from the pool's mean row.
BATCH_BYTES = 32 * 2**20


class ResultStream(StreamingResponse):
    """Streams bytes from a generator, and closes it whatever happens."""

    def __init__(self, content: ByteStream, *, media_type: str, headers: dict[str, str] | None = None) -> None:
        self._content = content
        super().__init__(content, media_type=media_type, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # What fails on the way to the first bytes still gets its own status: none has been sent yet.
            first = await run_sync(next, self._content, b"")
            self.body_iterator = iterate_in_threadpool(itertools.chain((first,), self._content))
            await super().__call__(scope, receive, send)
        finally:
            self._content.close()


class Rows:
    """The rows of one succeeded job, read batch by batch."""

    def __init__(self, sessions: Sessions, store: ArtifactStore, job: repository.Job) -> None:
        self._sessions = sessions
        self._store = store
        self._job = job
        self._pool = job.pool

    def weights(self, start: int = 0) -> Iterator[Columns]:
        """Every sample from `start` on, in pool order, a chunk at a time."""
        while start < self._pool.row_count:
            stop = min((start // CHUNK_SIZE + 1) * CHUNK_SIZE, self._pool.row_count)
            ids, sources = storage.read_ids(self._store, self._pool.fingerprint, start, stop)
            with self._sessions() as session:
                found = repository.weights(session, self._job.id, start, stop)
            yield weight_columns(found, ids, sources)
            start = stop

    def all(self) -> Iterator[Columns]:
        """Every sample in pool order, with its rank where it was selected."""
        for batch in self.weights():
            yield batch | self._selection(batch["index"])

    def all_with_content(self) -> Iterator[Columns]:
        """Like `all`, with the samples' content; a batch ends where its content reaches BATCH_BYTES."""
        kinds = content_kinds(self._store, self._pool.fingerprint)
        for samples in _batches(storage.iter_samples(self._store, self._pool.fingerprint)):
            start, stop = samples[0].index, samples[-1].index + 1
            with self._sessions() as session:
                found = repository.weights(session, self._job.id, start, stop)
            batch = weight_columns(found, [s.id for s in samples], [s.source for s in samples])
            yield batch | self._selection(batch["index"]) | _content(samples, kinds)

    def selected(self, batch_rows: int = CHUNK_SIZE) -> Iterator[Columns]:
        """The selected samples in rank order."""
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

    def selected_with_content(self) -> Iterator[Columns]:
        """Like `selected`, with the samples' content; as many a batch as hold BATCH_BYTES at the pool's mean size."""
        kinds = content_kinds(self._store, self._pool.fingerprint)
        rows = BATCH_BYTES * self._pool.row_count // self._pool.byte_count
        for batch in self.selected(min(max(rows, 1), CHUNK_SIZE)):
            samples = storage.read_samples(self._store, self._pool.fingerprint, batch["index"])
            yield batch | _content(samples, kinds)

    def _selection(self, indices: list[int]) -> Columns:
        with self._sessions() as session:
            ranks = repository.ranks(session, self._job.id, indices[0], indices[-1] + 1)
        return {"selected": [index in ranks for index in indices], "rank": [ranks.get(index) for index in indices]}


def weight_columns(weights: repository.Weights, ids: Sequence[str], sources: Sequence[str | None]) -> Columns:
    """The columns of samples [weights.start, ...), whose ids and sources are given."""
    return {
        "index": list(range(weights.start, weights.start + len(weights.influence))),
        "id": list(ids),
        "source": list(sources),
        "influence": weights.influence,
        "weight": weights.weight,
        "exact": weights.exact,
    }


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
    with store.open(storage.rows_key(fingerprint)) as file, pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(columns=["sample"], use_threads=False):
            is_messages = pc.starts_with(batch.column("sample"), '{"messages"')
            found.update("messages" if value else "text" for value in pc.unique(is_messages).to_pylist())
            if len(found) == 2:
                break
    return sorted(found)


def _content(samples: Sequence[storage.Sample], kinds: Sequence[str]) -> Columns:
    return {kind: [getattr(sample, kind) for sample in samples] for kind in kinds}
