"""Results of a job: weights in chunks, the selected samples, the summary and the provenance."""

from typing import Any

from sqlalchemy import BigInteger, Boolean, CheckConstraint, ForeignKey, LargeBinary, UniqueConstraint
from sqlalchemy.dialects.postgresql import ARRAY, REAL
from sqlalchemy.orm import Mapped, mapped_column

from service.db.engine import Base, CreatedAt
from winnow.merkle import CHUNK_SIZE


class WeightChunk(Base):
    """Samples [chunk_no * CHUNK_SIZE, ...) of the pool, in pool order.

    Chunks of arrays take a ninth of the space of one row per sample and load thirty times faster; the view `sample_weights`
    expands them for SQL. An influence of NaN is none: the sample took no part. `sha256` is that of the three arrays' bytes
    (float32, float32, uint8; little-endian) in a row.
    """

    __tablename__ = "weight_chunks"
    __table_args__ = (
        CheckConstraint(
            f"cardinality(influence) BETWEEN 1 AND {CHUNK_SIZE}"
            " AND cardinality(weight) = cardinality(influence) AND cardinality(exact) = cardinality(influence)",
            name="arrays_of_one_length",
        ),
        CheckConstraint("length(sha256) = 32", name="sha256_length"),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("selection_jobs.id", ondelete="CASCADE"), primary_key=True)
    chunk_no: Mapped[int] = mapped_column(primary_key=True)
    influence: Mapped[list[float]] = mapped_column(ARRAY(REAL))
    weight: Mapped[list[float]] = mapped_column(ARRAY(REAL))
    exact: Mapped[list[bool]] = mapped_column(ARRAY(Boolean))
    sha256: Mapped[bytes] = mapped_column(LargeBinary)


class SelectedSample(Base):
    """A sample of the selection; `rank` 0 was taken first."""

    __tablename__ = "selected_samples"
    __table_args__ = (
        UniqueConstraint("job_id", "sample_index"),
        CheckConstraint("rank >= 0", name="rank_not_negative"),
        CheckConstraint("weight >= 0", name="weight_not_negative"),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("selection_jobs.id", ondelete="CASCADE"), primary_key=True)
    rank: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    sample_index: Mapped[int] = mapped_column(BigInteger)
    sample_id: Mapped[str]
    source: Mapped[str | None]
    influence: Mapped[float] = mapped_column(REAL)
    weight: Mapped[float] = mapped_column(REAL)
    exact: Mapped[bool]


class JobResult(CreatedAt, Base):
    """The summary: fidelity, histogram, quantiles, counts by source, seconds by stage."""

    __tablename__ = "job_results"

    job_id: Mapped[str] = mapped_column(ForeignKey("selection_jobs.id", ondelete="CASCADE"), primary_key=True)
    sample_count: Mapped[int] = mapped_column(BigInteger)
    summary: Mapped[dict[str, Any]]


class StoredCharts(CreatedAt, Base):
    """What pictures of the result are drawn from (`chart_schemas.Charts`); results of earlier versions have none."""

    __tablename__ = "result_charts"

    job_id: Mapped[str] = mapped_column(ForeignKey("selection_jobs.id", ondelete="CASCADE"), primary_key=True)
    charts: Mapped[dict[str, Any]]


class Provenance(CreatedAt, Base):
    """All that is needed to audit or repeat a job. A trigger refuses every change of a row."""

    __tablename__ = "provenance"
    __table_args__ = (CheckConstraint("length(weights_root) = 32", name="weights_root_length"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("selection_jobs.id"), primary_key=True)
    weights_root: Mapped[bytes] = mapped_column(LargeBinary)
    record: Mapped[dict[str, Any]]
