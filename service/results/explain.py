"""Why a sample has its influence: its influence on every target, and the landmarks that contributed to it.

All of it is read from the artifacts of the job's stages. The landmarks' contributions to a propagated sample must add up to its
influence, and its influence on the targets must have the published mean; if not, or if an artifact is missing, the answer says
why there is no explanation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from service.results import repository
from service.results.formats import or_null, shortest
from service.results.schemas import Explanation, LandmarkOut, OtherLandmarks, SampleOut, TargetInfluence, TargetsPage
from service.results.service import FinishedJob
from service.results.tensor_reader import Tensors, npy_row
from service.storage.artifacts import ArtifactStore
from service.storage.checksums import ArtifactDamaged

Vector = npt.NDArray[np.float64]

_ROWS = 256  # landmarks at a time: bounds what is read of their embeddings
_TOLERANCE = 1e-5  # influence is kept in float32
_AGAIN = "Post the same job again: it reuses what still exists, recomputes the rest, and its samples can be explained."

_SENTENCES = {
    "own_gradient": "The influence was computed from the sample's own gradient; no landmark contributed to it.",
    "landmarks": "The influence is the sum of the landmarks' contributions, by the similarity of their embeddings to its own.",
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
        landmarks, others = self._landmarks(explained)
        return finished(explained_by="landmarks", sentence=_SENTENCES["landmarks"], landmarks=landmarks, others=others)

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
        data = [
            TargetInfluence(index=index, id=id, influence=values[index] if counts else None, counts=counts)
            for index, (id, counts) in enumerate(zip(ids, self._counts[start:stop].tolist(), strict=True), start)
        ]
        return TargetsPage.of(data, stop < len(values), "index")

    def _landmarks(self, explained: float) -> tuple[list[LandmarkOut], OtherLandmarks]:
        """The landmarks of the largest contributions, by absolute value, and the sum of all others."""
        row = 0 if self._query.target is None else 1 + self._query.target
        with self._store.open(self._propagated["explanation"]) as file:
            tensors = Tensors(file)
            kernel = self._kernel(tensors)
            contribution = kernel * tensors.row("coefficients", row)
            size = np.abs(contribution)
            _check(contribution.sum(), explained, scale=size.sum())
            first = np.argsort(-size, kind="stable")
            named, others = first[: self._query.landmarks], first[self._query.landmarks :]
            places = tensors.rows("index", 0, len(kernel))[named]
            own = tensors.row("influence", row)[named]
        share = size / (size.sum() or 1.0)
        names = [storage.read_ids(self._store, self._pool, place, place + 1) for place in places.tolist()]
        columns = zip(places, names, own, kernel[named], contribution[named], share[named], strict=True)
        found = [
            LandmarkOut(index=i, id=ids[0], source=sources[0], influence=p, kernel=k, contribution=c, share=s)
            for i, (ids, sources), p, k, c, s in columns
        ]
        rest = OtherLandmarks(count=len(others), contribution=contribution[others].sum(), share=share[others].sum())
        return found, rest

    def _kernel(self, landmarks: Tensors) -> Vector:
        """The kernel between the sample and each landmark (METHOD 2), in float64 as it was fitted."""
        unit = self._job.shard(Stage.EMBED, self._query.index)
        with self._store.open(unit.artifact_key) as file:
            own = Tensors(file).row("embeddings", self._query.index - unit.spec["start"]).astype(np.float64)
        sigma, count = self._propagated["sigma"], landmarks.length("embeddings")
        parts = []
        for start in range(0, count, _ROWS):
            block = landmarks.rows("embeddings", start, min(start + _ROWS, count)).astype(np.float64)
            if sigma is None:
                parts.append(block @ own)
            else:
                squared = np.square(block - own).sum(axis=1)
                is_laplacian = self._propagated.get("kernel") == "laplacian"  # not there in results of earlier versions
                parts.append(np.exp(np.sqrt(squared) / -sigma if is_laplacian else squared * (-0.5 / sigma**2)))
        return np.concatenate(parts)


def _check(found: float, published: float, *, scale: float) -> None:
    if not abs(found - published) <= _TOLERANCE * scale:
        raise Unexplained(
            f"The job's artifacts were removed and have since been recomputed with different figures. {_AGAIN}"
        )
