"""Why a sample has its influence: its influence on every target, and the landmarks that contributed to it.

All of it is read from the artifacts of the job's stages. What the regression on the exact samples gives a propagated sample must
be its influence, and its influence on the targets must have the published mean; if not, or if an artifact is missing, the
answer says why there is no explanation.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from service import ledger
from service.datasets import storage
from service.datasets.tables import Dataset
from service.http.errors import NotFound, Unprocessable
from service.ledger.tables import JobUnit, SelectionJob
from service.plan.stages import Stage
from service.results import neighbours, repository
from service.results.formats import or_null, shortest
from service.results.schemas import Explanation, LandmarkOut, SampleOut, TakenBy, TargetInfluence, TargetsPage
from service.results.service import FinishedJob
from service.results.tensor_reader import Tensors, npy_row
from service.storage.artifacts import ArtifactStore
from service.storage.checksums import ArtifactDamaged

Vector = npt.NDArray[np.float64]

_EXCERPT = 300  # characters
_READ_AT_ONCE = 64  # a row may have a megabyte
_TOLERANCE = 1e-5  # influence is kept in float32
_AGAIN = "Post the same job again: it reuses what still exists, recomputes the rest, and its samples can be explained."

_SENTENCES = {
    "own_gradient": "The influence was computed from the sample's own gradient; no landmark contributed to it.",
    "landmarks": "The influence was propagated: it is the average of the landmarks, by how much the nearest exact samples differ"
    " from that, and the correction of the regression on all exact samples.",
    "embedding_similarity": "The influence is the cosine of the sample's embedding with those of the targets.",
}
_DRAWN = "The method is random: the selection was drawn from the seed, and no influence was computed."
_LEFT_OUT = {
    "not_finite": "The sample's loss, gradient or embedding is not finite, so it has no influence and cannot be selected.",
    "duplicate": "The sample says the same as another one of the pool, and the job left it out (duplicates: one).",
    "overlap": "The sample says the same as one of the target, and the job left it out (overlap: exclude).",
    "no_reply": "The sample has no response tokens to learn from, so it has no influence and cannot be selected.",
}
_NOT_RENDERED = (
    "The model's chat template cannot render the sample ({}), so it has no influence and cannot be selected."
)
_TARGET_LEFT_OUT = (
    "The target sample cannot be used or has no finite gradient or embedding, so nothing has an influence on it."
)


class Unexplained(Exception):
    """There is no explanation; the message says why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleQuery:
    """`target`: None for the mean influence. `landmarks`: how many contributing landmarks to list."""

    index: int
    landmarks: int
    target: int | None
    first_target: int
    targets_limit: int


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the results of a job come from: its method, its target's fingerprint and rows, and units of its stages."""

    method: str | None
    target: str
    target_count: int
    units: Sequence[JobUnit]

    @classmethod
    def of(cls, session: Session, job_id: str) -> Self:
        job = session.get_one(SelectionJob, job_id)
        target = session.get_one(Dataset, job.target_id)
        units = ledger.unit_results(session, job_id, Stage.PREPARE, Stage.EMBED, Stage.PROPAGATE, Stage.SELECT)
        return cls(job.parameters.get("method"), target.fingerprint, target.row_count, units)

    @property
    def is_explained(self) -> bool:
        """Whether its stages stored what an explanation needs, which earlier versions did not."""
        return any(unit.stage is Stage.SELECT and "reasons" in (unit.result or {}) for unit in self.units)

    def taken_by(self, store: ArtifactStore, rank: int) -> TakenBy | None:
        """The target whose turn it was; None where the selection is not by round robin, or of an earlier version."""
        turns = next(
            ((unit.result or {}).get("turns") for unit in reversed(self.units) if unit.stage is Stage.SELECT), None
        )
        if not turns:
            return None
        target = turns[rank % len(turns)]
        (name,), _ = storage.read_ids(store, self.target, target, target + 1)
        return TakenBy(target=target, id=name, pick=rank // len(turns))

    def unit(self, stage: Stage) -> JobUnit:
        """The stage's last unit, which supersedes earlier ones when landmarks were added."""
        return next(unit for unit in reversed(self.units) if unit.stage is stage)

    def shard(self, stage: Stage, row: int) -> JobUnit:
        """The stage's unit that computed this row."""
        units = (unit for unit in self.units if unit.stage is stage)
        return next(unit for unit in units if unit.spec["start"] <= row < unit.spec["stop"])


def sample(session: Session, store: ArtifactStore, job: FinishedJob, query: SampleQuery) -> SampleOut:
    """One sample of a job that has succeeded, with its content and its explanation, or why it has none.

    Raises:
        NotFound: the pool has no such sample.
        Unprocessable: the target has no such sample.
    """
    index, count = query.index, job.pool.row_count
    if not 0 <= index < count:
        raise NotFound(f"The pool has {count} samples, with index 0 to {count - 1}.", param="index")
    origin = Origin.of(session, job.id)
    if query.target is not None and query.target >= origin.target_count:
        last = origin.target_count - 1
        raise Unprocessable(f"target: the target has samples with index 0 to {last}.", param="target")
    found = repository.weights(session, job.id, index, index + 1)
    (influence,), (weight,), exact = or_null(found.influence), shortest(found.weight), bool(found.exact[0])
    rank = repository.ranks(session, job.id, index, index + 1).get(index)
    session.commit()  # no transaction is open while the store is read
    ids, sources = storage.read_ids(store, job.pool.fingerprint, index, index + 1)
    content, content_missing = _content(store, job.pool, index)
    explanation, missing = None, None
    try:
        explanation = explained(store, origin, query, job.pool.fingerprint, influence, exact)
    except Unexplained as error:
        missing = str(error)
    taken_by = None
    if rank is not None:
        with suppress(FileNotFoundError):  # the target was deleted
            taken_by = origin.taken_by(store, rank)
    return SampleOut(
        job_id=job.id,
        index=index,
        id=ids[0],
        source=sources[0],
        influence=influence,
        weight=weight,
        exact=exact,
        selected=rank is not None,
        rank=rank,
        taken_by=taken_by,
        messages=content.messages if content else None,
        tools=content.tools if content else None,
        text=content.text if content else None,
        content_missing=content_missing,
        explanation=explanation,
        explanation_missing=missing,
    )


def _content(store: ArtifactStore, pool: Dataset, index: int) -> tuple[storage.Sample | None, str | None]:
    if pool.deleted_at is None:
        try:
            return storage.read_samples(store, pool.fingerprint, [index])[0], None
        except (FileNotFoundError, ArtifactDamaged):  # or it was deleted since the job was looked up
            return (
                None,
                f"The rows of the pool {pool.id} are missing or damaged. Upload the same rows again to repair it.",
            )
    return None, f"The pool {pool.id} has been deleted, including its text."


def index_of(store: ArtifactStore, job: FinishedJob, name: str) -> int:
    """Where the sample of this id stands in the job's pool; reads the ids a batch at a time, up to it.

    Raises:
        NotFound: the pool has no such sample.
    """
    start = 0
    for ids, _ in storage.iter_ids(store, job.pool.fingerprint):
        if name in ids:
            return start + ids.index(name)
        start += len(ids)
    raise NotFound("The pool has no sample with this id.", param="id")


def _excerpts(store: ArtifactStore, dataset: str, indices: Sequence[int]) -> list[str | None]:
    """The beginning of what each of the samples says, None where the rows are not there any more."""
    try:
        found: list[str | None] = []
        for start in range(0, len(indices), _READ_AT_ONCE):
            samples = storage.read_samples(store, dataset, list(indices[start : start + _READ_AT_ONCE]))
            found += [_excerpt(sample) for sample in samples]
        return found
    except (FileNotFoundError, ArtifactDamaged):
        return [None] * len(indices)


def _excerpt(sample: storage.Sample) -> str:
    if sample.messages is None:
        said = (sample.text or "")[: _EXCERPT + 1]
    else:
        parts = (f"{message['role']}: {message['content'][: _EXCERPT + 1]}" for message in sample.messages)
        said = "\n".join(islice(parts, _EXCERPT))
    return said if len(said) <= _EXCERPT else said[:_EXCERPT] + "…"


def explained(
    store: ArtifactStore, job: Origin, query: SampleQuery, pool: str, influence: float | None, exact: bool
) -> Explanation:
    """Explains the published influence of a sample, None where it took no part. `pool` is the fingerprint of the job's pool.

    Raises:
        Unexplained: a version that stored less computed the job, or its artifacts have been removed or recomputed.
    """
    if job.method == "random" and influence is not None:
        return Explanation(explained_by="none", sentence=_DRAWN, target=None, influence=influence, targets=None)
    if not job.is_explained:
        raise Unexplained(f"The job was computed by a version of Winnow that stored less. {_AGAIN}")
    try:
        if influence is None:
            return _left_out(store, job, query.index)
        return _Sample(store, job, query, pool).explanation(influence, exact)
    except FileNotFoundError as error:
        raise Unexplained(f"The job's artifacts have been removed to free space. {_AGAIN}") from error
    except ArtifactDamaged as error:
        if storage.fingerprint_of(error.key) is not None:
            raise
        raise Unexplained(f"An artifact of the job was damaged and has been set aside. {_AGAIN}") from error


def _left_out(store: ArtifactStore, job: Origin, index: int) -> Explanation:
    selected = job.unit(Stage.SELECT)
    with store.open(selected.artifact_key) as file:
        reason = (selected.result or {})["reasons"][int(Tensors(file).row("reason", index)) - 1]
    named = (job.unit(Stage.PREPARE).result or {})["unusable"]["pool"]["first"]
    detail = next((row["detail"] for row in named if row["index"] == index), None)
    sentence = _LEFT_OUT.get(reason, _NOT_RENDERED.format(detail or reason))
    return Explanation(explained_by="none", sentence=sentence, reason=reason, target=None, influence=None, targets=None)


class _Sample:
    def __init__(self, store: ArtifactStore, job: Origin, query: SampleQuery, pool: str) -> None:
        self._store = store
        self._job = job
        self._query = query
        self._pool = pool
        self._selected: dict[str, Any] = job.unit(Stage.SELECT).result or {}
        self._propagated: dict[str, Any] = job.unit(Stage.PROPAGATE).result or {}
        self._counts = np.ones(job.target_count, dtype=bool)
        self._counts[self._selected["excluded_targets"]] = False

    def explanation(self, published: float, exact: bool) -> Explanation:
        query = self._query
        values = self._on_targets()
        _check(values[self._counts].mean(), published, scale=np.abs(values).mean())
        finished = partial(Explanation, target=query.target, targets=self._targets(values))
        if query.target is not None and not self._counts[query.target]:
            return finished(explained_by="none", sentence=_TARGET_LEFT_OUT, influence=None)
        explained = published if query.target is None else float(values[query.target])
        finished = partial(finished, influence=explained)
        if exact:
            by = "embedding_similarity" if self._job.method == "rds_plus" else "own_gradient"
            return finished(explained_by=by, sentence=_SENTENCES[by])
        return finished(explained_by="landmarks", sentence=_SENTENCES["landmarks"], **self._parts(explained))

    def _on_targets(self) -> Vector:
        """The sample's influence on every target, the refined one if there is one."""
        refined = self._selected.get("explanation")  # of a job from before rounds; now it is among the propagated
        if refined is not None:
            with self._store.open(refined) as file:
                tensors = Tensors(file)
                rows = tensors.rows("index", 0, tensors.length("index"))
                place = int(np.searchsorted(rows, self._query.index))
                if place < len(rows) and rows[place] == self._query.index:
                    return tensors.row("influence", place).astype(np.float64)
        with self._store.open(self._job.unit(Stage.PROPAGATE).artifact_key) as file:
            return npy_row(file, self._query.index)[: self._job.target_count].astype(np.float64)

    def _targets(self, values: Vector) -> TargetsPage:
        start = self._query.first_target
        stop = min(start + self._query.targets_limit, len(values))
        ids, _ = storage.read_ids(self._store, self._job.target, start, stop)
        excerpts = _excerpts(self._store, self._job.target, range(start, stop))
        columns = enumerate(zip(ids, excerpts, self._counts[start:stop].tolist(), strict=True), start)
        data = [
            TargetInfluence(
                index=index, id=id, excerpt=excerpt, influence=values[index] if counts else None, counts=counts
            )
            for index, (id, excerpt, counts) in columns
        ]
        return TargetsPage.of(data, stop < len(values), "index")

    def _parts(self, explained: float) -> dict[str, Any]:
        """Fields of the explanation of a propagated influence."""
        row, index = 0 if self._query.target is None else 1 + self._query.target, self._query.index
        shard = self._job.shard(Stage.EMBED, index)
        with self._store.open(shard.artifact_key) as file:
            own = Tensors(file).row("embeddings", index - shard.spec["start"]).astype(np.float64)
        with self._store.open(self._propagated["explanation"]) as file:
            tensors = Tensors(file)
            kernel = neighbours.kernel_of(tensors, own, self._propagated)
            terms = kernel * tensors.row("coefficients", row)
            _check(terms.sum(), explained, scale=np.abs(terms).sum())
            found = neighbours.parts(tensors, row, kernel, self._query.landmarks, explained)
        rows = [storage.read_ids(self._store, self._pool, place, place + 1) for place in found.place.tolist()]
        excerpts = _excerpts(self._store, self._pool, found.place.tolist())
        columns = zip(
            *(found.place, rows, excerpts, found.influence, found.kernel, found.weight, found.contribution), strict=True
        )
        landmarks = [
            LandmarkOut(
                index=i, id=ids[0], source=sources[0], excerpt=text, influence=p, kernel=k, weight=w, contribution=c
            )
            for i, (ids, sources), text, p, k, w, c in columns
        ]
        return {"average": found.average, "landmarks": landmarks, "correction": found.correction}


def _check(found: float, published: float, *, scale: float) -> None:
    if not abs(found - published) <= _TOLERANCE * scale:
        raise Unexplained(
            f"The job's artifacts were removed and have since been recomputed with different figures. {_AGAIN}"
        )
