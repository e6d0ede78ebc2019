"""All SQL of results. Jobs are found through their tenant; the other functions take the id of a job found that way."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from psycopg import Connection as PsycopgConnection
from sqlalchemy import Row, TextClause, select, text
from sqlalchemy import delete as delete_from
from sqlalchemy.orm import Session

from service.datasets.tables import Dataset
from service.jobs import repository as jobs
from service.jobs.state import JobStatus
from service.jobs.tables import SelectionJob
from service.results.tables import CHUNK_SIZE, JobResult, Provenance, SelectedSample, WeightChunk


@dataclass(frozen=True, slots=True)
class Pool:
    """What an export needs to know of the pool of a job."""

    id: str
    fingerprint: str
    row_count: int
    byte_count: int
    deleted: bool


@dataclass(frozen=True, slots=True)
class Job:
    id: str
    status: JobStatus
    error: dict[str, Any] | None
    pool: Pool


@dataclass(frozen=True, slots=True)
class Weights:
    """Samples [start, start + len(influence)) of the pool."""

    start: int
    influence: list[float]
    weight: list[float]
    exact: list[bool]


@dataclass(frozen=True, slots=True)
class WeightArrays:
    """What `Weights` holds, as arrays: float32, float32, bool."""

    influence: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    exact: npt.NDArray[np.bool_]


def job(session: Session, tenant_id: str, job_id: str, *, or_deleted: bool = False) -> Job | None:
    if not jobs.is_id(job_id):
        return None
    found = (
        select(SelectionJob.status, SelectionJob.error, Dataset)
        .join(Dataset, Dataset.id == SelectionJob.pool_id)
        .where(SelectionJob.id == job_id, SelectionJob.tenant_id == tenant_id)
    )
    row = session.execute(found if or_deleted else found.where(SelectionJob.deleted_at.is_(None))).one_or_none()
    if row is None:
        return None
    status, error, pool = row
    deleted = pool.deleted_at is not None
    return Job(job_id, status, error, Pool(pool.id, pool.fingerprint, pool.row_count, pool.byte_count, deleted))


def delete(session: Session, job_id: str) -> None:
    """Deletes the weights, the selection and the summary; the provenance stays, which a trigger sees to."""
    for table in (WeightChunk, SelectedSample, JobResult):
        session.execute(delete_from(table).where(table.job_id == job_id))


def result(session: Session, job_id: str) -> JobResult:
    return session.get_one(JobResult, job_id)


def provenance(session: Session, job_id: str) -> Provenance:
    return session.get_one(Provenance, job_id)


def weights_root(session: Session, job_id: str) -> str:
    """The Merkle root of the weights, in hexadecimal digits."""
    return session.scalars(select(Provenance.weights_root).where(Provenance.job_id == job_id)).one().hex()


def chunk_hashes(session: Session, job_id: str) -> list[str]:
    """Of each chunk, in hexadecimal digits; none of a deleted job."""
    hashes = select(WeightChunk.sha256).where(WeightChunk.job_id == job_id).order_by(WeightChunk.chunk_no)
    return [sha256.hex() for sha256 in session.scalars(hashes)]


# Written out as SQL because the arrays are cut there: a page of 10 does not carry 16,384 samples here.
_CUT = f"[:start - chunk_no * {CHUNK_SIZE}::bigint + 1 : :stop - chunk_no * {CHUNK_SIZE}::bigint]"
_CHUNKS = "FROM weight_chunks WHERE job_id = :job_id AND chunk_no BETWEEN :first AND :last ORDER BY chunk_no"
_WEIGHTS = text(f"SELECT influence{_CUT} AS influence, weight{_CUT} AS weight, exact{_CUT} AS exact {_CHUNKS}")
# As PostgreSQL sends arrays in binary: a header of 20 bytes, then each element's length and value.
_SENT_WEIGHTS = text(
    f"SELECT array_send(influence{_CUT}) AS influence, array_send(weight{_CUT}) AS weight,"
    f" array_send(exact{_CUT}) AS exact {_CHUNKS}"
)
_SENT_HEADER = 20
_SENT_FLOAT = np.dtype([("length", ">i4"), ("value", ">f4")])
_SENT_BOOL = np.dtype([("length", ">i4"), ("value", "?")])


def weights(session: Session, job_id: str, start: int, stop: int) -> Weights:
    """Samples [start, stop), which must all exist; only the chunks that hold them are read.

    Raises:
        RuntimeError: the table does not hold all of them.
    """
    rows = _chunks(session, _WEIGHTS, job_id, start, stop)
    found = Weights(
        start,
        influence=[value for row in rows for value in row.influence],
        weight=[value for row in rows for value in row.weight],
        exact=[value for row in rows for value in row.exact],
    )
    _check_stored(job_id, start, stop, len(found.influence))
    return found


def weight_arrays(session: Session, job_id: str, start: int, stop: int) -> WeightArrays:
    """Like `weights`, for many samples: no value becomes a Python object."""
    rows = _chunks(session, _SENT_WEIGHTS, job_id, start, stop)
    found = WeightArrays(
        influence=np.concatenate([_received(row.influence, _SENT_FLOAT) for row in rows], dtype=np.float32),
        weight=np.concatenate([_received(row.weight, _SENT_FLOAT) for row in rows], dtype=np.float32),
        exact=np.concatenate([_received(row.exact, _SENT_BOOL) for row in rows]),
    )
    _check_stored(job_id, start, stop, len(found.influence))
    return found


def _received(sent: bytes, element: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.frombuffer(sent, element, offset=_SENT_HEADER)["value"]


def _chunks(session: Session, statement: TextClause, job_id: str, start: int, stop: int) -> Sequence[Row[Any]]:
    first, last = start // CHUNK_SIZE, (stop - 1) // CHUNK_SIZE
    where = {"job_id": job_id, "start": start, "stop": stop, "first": first, "last": last}
    rows = session.execute(statement, where).all()
    if not rows:
        _check_stored(job_id, start, stop, 0)
    return rows


def _check_stored(job_id: str, start: int, stop: int, found: int) -> None:
    if found != stop - start:
        raise RuntimeError(f"weights [{start}, {stop}) of {job_id}: only {found} are stored")


def selected_after(session: Session, job_id: str, after_rank: int, limit: int) -> Sequence[SelectedSample]:
    """The selected samples that follow `after_rank`, in rank order."""
    return session.scalars(
        select(SelectedSample)
        .where(SelectedSample.job_id == job_id, SelectedSample.rank > after_rank)
        .order_by(SelectedSample.rank)
        .limit(limit)
    ).all()


def ranks(session: Session, job_id: str, start: int, stop: int) -> dict[int, int]:
    """Sample index -> rank, of the selected ones among samples [start, stop)."""
    rows = session.execute(
        select(SelectedSample.sample_index, SelectedSample.rank).where(
            SelectedSample.job_id == job_id, SelectedSample.sample_index >= start, SelectedSample.sample_index < stop
        )
    ).all()
    return {row.sample_index: row.rank for row in rows}


def copy_in(session: Session, table: str, columns: dict[str, str], rows: Iterable[Sequence[object]]) -> None:
    """Adds rows by binary COPY, in the session's transaction; `columns` maps each name to its PostgreSQL type.

    COPY takes a sixth of the time of INSERT here: a million weights in 0.9 s instead of 5.7 s.
    """
    session.flush()  # COPY goes past the session, and may refer to what it has not written yet
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, PsycopgConnection)
    statement = f"COPY {table} ({', '.join(columns)}) FROM STDIN WITH (FORMAT BINARY)"
    with connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
        copy.set_types(list(columns.values()))
        for row in rows:
            copy.write_row(row)
