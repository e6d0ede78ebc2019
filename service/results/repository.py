"""All SQL of results. Every function takes the id of a job that was found through its tenant (`service.ledger.require_job`)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from psycopg import Connection as PsycopgConnection
from sqlalchemy import and_, func, or_, select, text
from sqlalchemy import delete as delete_from
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from service.db.pagination import paginate
from service.results.tables import JobResult, Provenance, SelectedSample, StoredCharts, WeightChunk
from winnow.merkle import CHUNK_SIZE


@dataclass(frozen=True, slots=True)
class Weights:
    """Samples [start, stop) of the pool: (n,) float32, float32 and bool."""

    influence: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    exact: npt.NDArray[np.bool_]


def delete(session: Session, job_id: str) -> None:
    """Deletes the weights, the selection, the summary and the charts; a trigger protects the provenance."""
    for table in (WeightChunk, SelectedSample, JobResult, StoredCharts):
        session.execute(delete_from(table).where(table.job_id == job_id))


def result(session: Session, job_id: str) -> JobResult:
    return session.get_one(JobResult, job_id)


def charts(session: Session, job_id: str) -> StoredCharts | None:
    return session.get(StoredCharts, job_id)


def provenance(session: Session, job_id: str) -> Provenance:
    return session.get_one(Provenance, job_id)


def weights_root(session: Session, job_id: str) -> str:
    """The Merkle root of the weights, in hexadecimal."""
    return session.scalars(select(Provenance.weights_root).where(Provenance.job_id == job_id)).one().hex()


def chunk_hashes(session: Session, job_id: str) -> list[str]:
    """Of each chunk, in hexadecimal; empty for a deleted job."""
    hashes = select(WeightChunk.sha256).where(WeightChunk.job_id == job_id).order_by(WeightChunk.chunk_no)
    return [sha256.hex() for sha256 in session.scalars(hashes)]


# Written out as SQL because the arrays are cut there: a page of 10 does not carry 16,384 samples here. As PostgreSQL sends arrays
# in binary (a header of 20 bytes, then each element's length and value), so that no value becomes a Python object.
_CUT = f"[:start - chunk_no * {CHUNK_SIZE}::bigint + 1 : :stop - chunk_no * {CHUNK_SIZE}::bigint]"
_SENT_WEIGHTS = text(
    f"SELECT array_send(influence{_CUT}) AS influence, array_send(weight{_CUT}) AS weight, array_send(exact{_CUT}) AS exact"
    " FROM weight_chunks WHERE job_id = :job_id AND chunk_no BETWEEN :first AND :last ORDER BY chunk_no"
)
_SENT_HEADER = 20
_SENT_FLOAT = np.dtype([("length", ">i4"), ("value", ">f4")])
_SENT_BOOL = np.dtype([("length", ">i4"), ("value", "?")])


def weights(session: Session, job_id: str, start: int, stop: int) -> Weights:
    """Samples [start, stop), which must all exist; only the chunks that hold them are read.

    Raises:
        RuntimeError: the table does not hold all of them.
    """
    first, last = start // CHUNK_SIZE, (stop - 1) // CHUNK_SIZE
    where = {"job_id": job_id, "start": start, "stop": stop, "first": first, "last": last}
    rows = session.execute(_SENT_WEIGHTS, where).all()
    empty = np.empty(0, np.float32)
    found = Weights(
        influence=np.concatenate([empty, *(_received(row.influence, _SENT_FLOAT) for row in rows)], dtype=np.float32),
        weight=np.concatenate([empty, *(_received(row.weight, _SENT_FLOAT) for row in rows)], dtype=np.float32),
        exact=np.concatenate([empty.astype(bool), *(_received(row.exact, _SENT_BOOL) for row in rows)]),
    )
    if len(found.influence) != stop - start:
        raise RuntimeError(f"weights [{start}, {stop}) of {job_id}: only {len(found.influence)} are stored")
    return found


def _received(sent: bytes, element: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.frombuffer(sent, element, offset=_SENT_HEADER)["value"]


def selected_after(session: Session, job_id: str, after_rank: int, limit: int) -> tuple[list[SelectedSample], bool]:
    """The selected samples that follow `after_rank`, in rank order."""
    selected = select(SelectedSample).where(SelectedSample.job_id == job_id)
    return paginate(session, selected, SelectedSample.rank, after=after_rank, limit=limit, ascending=True)


SELECTION_ORDER: dict[str, InstrumentedAttribute[Any]] = {
    "rank": SelectedSample.rank,
    "index": SelectedSample.sample_index,
    "influence": SelectedSample.influence,
    "weight": SelectedSample.weight,
}


def selected_page(
    session: Session,
    job_id: str,
    *,
    sort: str,
    descending: bool,
    source: str | None,
    exact: bool | None,
    after: int | None,
    limit: int,
) -> tuple[list[SelectedSample], bool]:
    """Of the selection those of the source and exact or not (None: any), by `sort`, of equal ones the first selected first.

    Args:
        sort: of SELECTION_ORDER.
        after: the rank of the last sample of the page before.
    """
    key, of_job = SELECTION_ORDER[sort], SelectedSample.job_id == job_id
    found = select(SelectedSample).where(of_job)
    if source is not None:
        found = found.where(SelectedSample.source == source)
    if exact is not None:
        found = found.where(SelectedSample.exact == exact)
    if after is not None:
        last = select(key).where(of_job, SelectedSample.rank == after).scalar_subquery()
        beyond = key < last if descending else key > last
        found = found.where(or_(beyond, and_(key == last, SelectedSample.rank > after)))
    ordered = found.order_by(key.desc() if descending else key.asc(), SelectedSample.rank)
    rows = list(session.scalars(ordered.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def ranks_of(session: Session, job_id: str, indices: Sequence[int]) -> dict[int, int]:
    """Sample index -> rank, of the selected ones among these samples."""
    columns = select(SelectedSample.sample_index, SelectedSample.rank)
    rows = session.execute(
        columns.where(SelectedSample.job_id == job_id, SelectedSample.sample_index.in_(indices))
    ).all()
    return {row.sample_index: row.rank for row in rows}


def ranks(session: Session, job_id: str, start: int, stop: int) -> dict[int, int]:
    """Sample index -> rank, of the selected ones among samples [start, stop)."""
    rows = session.execute(
        select(SelectedSample.sample_index, SelectedSample.rank).where(
            SelectedSample.job_id == job_id, SelectedSample.sample_index >= start, SelectedSample.sample_index < stop
        )
    ).all()
    return {row.sample_index: row.rank for row in rows}


def selected_between(session: Session, job_id: str, start: int, stop: int) -> dict[int, float]:
    """Sample index -> weight, of the selected ones among samples [start, stop), in pool order."""
    rows = session.execute(
        select(SelectedSample.sample_index, SelectedSample.weight)
        .where(
            SelectedSample.job_id == job_id, SelectedSample.sample_index >= start, SelectedSample.sample_index < stop
        )
        .order_by(SelectedSample.sample_index)
    ).all()
    return {row.sample_index: row.weight for row in rows}


def selection(session: Session, job_id: str) -> Iterator[tuple[int, int, float, float, bool]]:
    """Rank, index, influence, weight and exact of each selected sample, in rank order."""
    columns = (
        SelectedSample.rank,
        SelectedSample.sample_index,
        SelectedSample.influence,
        SelectedSample.weight,
        SelectedSample.exact,
    )
    rows = select(*columns).where(SelectedSample.job_id == job_id).order_by(SelectedSample.rank)
    yield from map(tuple, session.execute(rows.execution_options(yield_per=CHUNK_SIZE)))


_SENT_INFLUENCE = text(
    "SELECT array_send(influence) AS influence FROM weight_chunks"
    " WHERE job_id = :job_id AND chunk_no = ANY(:numbers) ORDER BY chunk_no"
)


def influence_of_chunks(session: Session, job_id: str, numbers: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
    """The influences of each of these chunks, in rising order."""
    where = {"job_id": job_id, "numbers": list(numbers)}
    for row in session.execute(_SENT_INFLUENCE.execution_options(yield_per=8), where):
        yield _received(row.influence, _SENT_FLOAT).astype(np.float32)


def selected_in_both(session: Session, first: str, second: str) -> int:
    """How many samples of one pool both jobs selected."""
    one, other = aliased(SelectedSample), aliased(SelectedSample)
    both = select(func.count()).select_from(one).join(other, one.sample_index == other.sample_index)
    return session.scalars(both.where(one.job_id == first, other.job_id == second)).one()


@dataclass(frozen=True, slots=True)
class InBoth:
    """How many selected samples of two pools have an id in common, and the influences of the first of them in either."""

    count: int
    first: list[float]
    second: list[float]


def selected_in_both_by_id(session: Session, first: str, second: str, most: int) -> InBoth:
    """`most`: of how many the influences are read, in the order of the first job's ranks."""
    one, other = aliased(SelectedSample), aliased(SelectedSample)
    both = (
        select(one.influence, other.influence, func.count().over())
        .join(other, one.sample_id == other.sample_id)
        .where(one.job_id == first, other.job_id == second)
        .order_by(one.rank)
        .limit(most)
    )
    rows = session.execute(both).all()
    return InBoth(rows[0][2] if rows else 0, [row[0] for row in rows], [row[1] for row in rows])


def copy_in(session: Session, table: str, columns: dict[str, str], rows: Iterable[Sequence[object]]) -> None:
    """Adds rows by binary COPY, in the session's transaction; `columns` maps each name to its PostgreSQL type.

    COPY takes a sixth of the time of INSERT here: a million weights in 0.9 s instead of 5.7 s.
    """
    session.flush()  # COPY bypasses the session, and may refer to rows that it has not written yet
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, PsycopgConnection)
    statement = f"COPY {table} ({', '.join(columns)}) FROM STDIN WITH (FORMAT BINARY)"
    with connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
        copy.set_types(list(columns.values()))
        for row in rows:
            copy.write_row(row)
