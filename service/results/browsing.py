"""Samples of a result in the order, and of the kind, that a caller asks for, a page at a time.

Pages of the pool in its own order read only the chunks that they need. In the order of a value all the values are read, 17 bytes
a sample, and no text. A text is looked for in a bounded part of the samples a call: a page may be short, even empty, while more
follow.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from service.datasets import search
from service.http.errors import Unprocessable
from service.results import repository
from service.results.formats import or_null, shortest
from service.results.service import FinishedJob, require_content
from service.results.tables import SelectedSample
from service.storage.artifacts import ArtifactStore
from service.storage.checksums import ArtifactDamaged
from winnow.merkle import CHUNK_SIZE

SEARCHED_BYTES = 2**28
"""In how many bytes of samples, at the pool's mean size, a text is looked for in one call."""
SEARCHED_SELECTED = 20_000
"""In how many of the selection."""
MOST_SCATTERED_BYTES = 2**32
"""A pool beyond this is searched in its own order only: in any other, every call reads most of it."""
_VALUES_AT_ONCE = 16 * CHUNK_SIZE

Indices = npt.NDArray[np.int64]
Item = TypeVar("Item")
_Row = tuple[int, float, float, bool]
_ROWS = np.dtype([("index", np.int64), ("influence", np.float32), ("weight", np.float32), ("exact", np.bool_)])
_Rows = npt.NDArray[np.void]


class Sort(StrEnum):
    """`RANK` is the selection's own order, `INDEX` the pool's."""

    RANK = "rank"
    INDEX = "index"
    INFLUENCE = "influence"
    WEIGHT = "weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A page: of which samples, in what order, after which one.

    Attributes:
        descending: the greatest first; of equal ones, and at the end those without influence, the first in the pool comes first.
        source, exact, selected, says: None: any. Of the selection, `selected` is not looked at.
        after: of the pool the index, of the selection the rank of the last sample looked at before.
        text: how many characters of what they say come with the samples; 0: none, and no row is read for it.
    """

    sort: Sort
    descending: bool = False
    source: str | None = None
    exact: bool | None = None
    selected: bool | None = None
    says: str | None = None
    after: int | None = None
    limit: int
    text: int = 0

    @property
    def is_filtered(self) -> bool:
        return any(each is not None for each in (self.source, self.exact, self.selected, self.says))


@dataclass(frozen=True, slots=True)
class Listed:
    """`text`: how it begins; None: not asked for, or the pool's rows have been removed."""

    index: int
    id: str
    source: str | None
    influence: float | None
    weight: float
    exact: bool
    rank: int | None
    text: str | None


@dataclass(frozen=True, slots=True)
class Found:
    """`last`: where the next page begins after; None: nothing was looked at."""

    rows: list[Listed]
    has_more: bool
    last: int | None


@dataclass(frozen=True, slots=True)
class _Batch(Generic[Item]):
    """Of `looked` samples, in order, up to the one numbered `last`, those that are as wanted."""

    looked: int
    last: int
    matching: list[Item]


def of_selection(session: Session, store: ArtifactStore, job: FinishedJob, wanted: Wanted) -> Found:
    """Samples of the selection.

    Raises:
        Gone: a text is looked for, and the pool's have been deleted.
        Unprocessable: the pool is too large to be searched in this order.
    """
    _require_searchable(job, wanted)
    rows, has_more, last = _page(
        _selected(session, store, job, wanted), wanted, SEARCHED_SELECTED, lambda row: row.rank
    )
    session.commit()  # no transaction is open while the store is read
    texts = _texts(store, job, wanted, [row.sample_index for row in rows])
    listed = [
        Listed(row.sample_index, row.sample_id, row.source, row.influence, row.weight, row.exact, row.rank, text)
        for row, text in zip(rows, texts, strict=True)
    ]
    return Found(listed, has_more, last)


def of_pool(session: Session, store: ArtifactStore, job: FinishedJob, wanted: Wanted) -> Found:
    """Samples of the pool, selected or not. Raises: like `of_selection`."""
    _require_searchable(job, wanted)
    searched = max(SEARCHED_BYTES * job.pool.row_count // job.pool.byte_count, 1)
    at_once = wanted.limit + 1 if wanted.says is None else searched
    parts = (_in_order if wanted.sort is Sort.INDEX else _by_value)(session, store, job, wanted)
    batches = (
        _batch(store, job, wanted, part[start : start + at_once])
        for part in parts
        for start in range(0, len(part), at_once)
    )
    rows, has_more, last = _page(batches, wanted, searched, lambda row: row[0])
    indices = [row[0] for row in rows]
    ranks = repository.ranks_of(session, job.id, indices)
    session.commit()
    ids, sources = search.ids_at(store, job.pool.fingerprint, indices)
    influences, weights = (np.array([row[place] for row in rows], np.float32) for place in (1, 2))
    texts = _texts(store, job, wanted, indices)
    columns = (indices, ids, sources, or_null(influences), shortest(weights), [row[3] for row in rows], texts)
    listed = [
        Listed(index, id, source, influence, weight, exact, ranks.get(index), text)
        for index, id, source, influence, weight, exact, text in zip(*columns, strict=True)
    ]
    return Found(listed, has_more, last)


def _page(
    batches: Iterable[_Batch[Item]], wanted: Wanted, searched: int, number: Callable[[Item], int]
) -> tuple[list[Item], bool, int | None]:
    """The page, whether more follow, and where they follow after. `searched`: after how many a search ends for now."""
    kept: list[Item] = []
    looked, last = 0, None
    for batch in batches:
        kept += batch.matching
        if len(kept) > wanted.limit:
            return kept[: wanted.limit], True, number(kept[wanted.limit - 1])
        looked, last = looked + batch.looked, batch.last
        if wanted.says is not None and looked >= searched:
            return kept, True, last
    return kept, False, last


def _selected(
    session: Session, store: ArtifactStore, job: FinishedJob, wanted: Wanted
) -> Iterator[_Batch[SelectedSample]]:
    after, has_more = wanted.after, True
    while has_more:
        rows, has_more = repository.selected_page(
            session,
            job.id,
            sort=wanted.sort,
            descending=wanted.descending,
            source=wanted.source,
            exact=wanted.exact,
            after=after,
            limit=wanted.limit + 1 if wanted.says is None else SEARCHED_SELECTED,
        )
        if not rows:
            return
        session.commit()
        said = _says(store, job, wanted, np.array([row.sample_index for row in rows], np.int64))
        after = rows[-1].rank
        yield _Batch(len(rows), after, [row for row, is_said in zip(rows, said.tolist(), strict=True) if is_said])


def _in_order(session: Session, store: ArtifactStore, job: FinishedJob, wanted: Wanted) -> Iterator[_Rows]:
    """By index, chunk by chunk."""
    first, stop = 0, job.pool.row_count
    if wanted.after is not None:
        first, stop = (first, min(stop, wanted.after)) if wanted.descending else (wanted.after + 1, stop)
    if first >= stop:
        return
    if not (wanted.descending or wanted.is_filtered):
        stop = min(stop, first + wanted.limit + 1)  # which is all that the page needs
    chunks = range(first // CHUNK_SIZE, -(-stop // CHUNK_SIZE))
    for chunk in reversed(chunks) if wanted.descending else chunks:
        rows = _rows(session, store, job, wanted, max(chunk * CHUNK_SIZE, first), min((chunk + 1) * CHUNK_SIZE, stop))
        yield rows[::-1] if wanted.descending else rows


def _by_value(session: Session, store: ArtifactStore, job: FinishedJob, wanted: Wanted) -> Iterator[_Rows]:
    """By influence or weight, all in one."""
    count = job.pool.row_count
    starts = range(0, count, _VALUES_AT_ONCE)
    rows = np.concatenate(
        [_rows(session, store, job, wanted, start, min(start + _VALUES_AT_ONCE, count)) for start in starts]
    )
    sign = np.float32(-1 if wanted.descending else 1)
    values = np.where(np.isnan(rows[wanted.sort]), np.inf, sign * rows[wanted.sort])  # no influence comes last
    if wanted.after is not None:
        place = np.flatnonzero(rows["index"] == wanted.after)
        if not place.size:
            raise Unprocessable(
                "after is none of the samples asked for; pass the last_id of the page before and ask for the same.",
                param="after",
            )
        last = values[place[0]]
        follows = (values > last) | ((values == last) & (rows["index"] > wanted.after))
        rows, values = rows[follows], values[follows]
    if wanted.says is None and len(rows) > wanted.limit:  # only these need to be sorted
        first = values <= np.partition(values, wanted.limit)[wanted.limit]
        rows, values = rows[first], values[first]
    yield rows[np.argsort(values, kind="stable")]


def _rows(session: Session, store: ArtifactStore, job: FinishedJob, wanted: Wanted, start: int, stop: int) -> _Rows:
    """Of the samples [start, stop) those that are as wanted, but for what they say, by index."""
    found = repository.weights(session, job.id, start, stop)
    rows = np.empty(stop - start, _ROWS)
    rows["index"] = np.arange(start, stop)
    rows["influence"], rows["weight"], rows["exact"] = found.influence, found.weight, found.exact
    if wanted.selected is not None:
        taken = [index - start for index in repository.ranks(session, job.id, start, stop)]
        is_selected = np.zeros(stop - start, bool)
        is_selected[taken] = True
        rows = rows[is_selected[rows["index"] - start] == wanted.selected]
    if wanted.exact is not None:
        rows = rows[rows["exact"] == wanted.exact]
    session.commit()  # no transaction is open while the store is read
    if wanted.source is not None:
        rows = rows[search.has_source(store, job.pool.fingerprint, wanted.source, rows["index"])]
    return rows


def _batch(store: ArtifactStore, job: FinishedJob, wanted: Wanted, rows: _Rows) -> _Batch[_Row]:
    return _Batch(rows.size, int(rows["index"][-1]), rows[_says(store, job, wanted, rows["index"])].tolist())


def _says(store: ArtifactStore, job: FinishedJob, wanted: Wanted, indices: Indices) -> npt.NDArray[np.bool_]:
    if wanted.says is None:
        return np.ones(len(indices), bool)
    return search.says(store, job.pool.fingerprint, wanted.says, indices)


def _texts(store: ArtifactStore, job: FinishedJob, wanted: Wanted, indices: Sequence[int]) -> Sequence[str | None]:
    if not wanted.text or job.pool.deleted_at is not None:
        return [None] * len(indices)
    try:
        return search.beginnings(store, job.pool.fingerprint, indices, wanted.text)
    except (FileNotFoundError, ArtifactDamaged):
        return [None] * len(indices)


def _require_searchable(job: FinishedJob, wanted: Wanted) -> None:
    if wanted.says is None:
        return
    require_content(job, "text", "omit text")
    if wanted.sort is not Sort.INDEX and job.pool.byte_count > MOST_SCATTERED_BYTES:
        raise Unprocessable(
            f"The pool is too large to be searched by {wanted.sort}; list the weights by index, which selected=true and the other"
            " filters apply to as well.",
            param="text",
        )
