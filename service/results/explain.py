"""Why a sample has its influence: its influence on every target, and the landmarks that spoke for it.

All of it is read from what the job's stages have left in the store. What a propagated sample got from its landmarks must add up
to its influence, and its influence on the targets must have the mean that was published; where it does not, or where something
is gone, there is no explanation, and it is said why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from service.artifacts import ArtifactStore
from service.datasets import storage
from service.datasets.tables import Dataset
from service.errors import NotFound, Unprocessable
from service.jobs import ledger
from service.jobs.state import Stage
from service.jobs.tables import JobUnit, SelectionJob
from service.results import repository
from service.results.repository import Pool
from service.results.schemas import Explanation, LandmarkOut, OtherLandmarks, SampleOut, TargetInfluence, TargetsPage
from service.results.slices import Tensors, npy_row

Vector = npt.NDArray[np.float64]

_ROWS = 256  # landmarks at a time: bounds what is read of their embeddings
_TOLERANCE = 1e-5  # influence is kept in float32
_AGAIN = (
    "Post the same job again: what is still there is reused, the rest is computed anew, and its samples are explained."
)

_SENTENCES = {
    "own_gradient": "The influence was computed from the sample's own gradient; no landmark spoke for it.",
    "landmarks": "The influence is the sum of what the landmarks contributed, by the likeness of their embeddings to its own.",
    "embedding_similarity": "The influence is the cosine of the sample's embedding with those of the targets.",
}
_DRAWN = "The method is random: the selection was drawn from the seed, and no influence was computed."
_NOTHING_FINITE = (
    "The sample's loss, gradient or embedding is not finite, so that it has no influence; it cannot be selected."
)
_NO_RESPONSE = "The sample has no response left to learn from, so that it has no influence; it cannot be selected."


class Unexplained(Exception):
    """There is no explanation; says why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """`target`: None asks for the mean influence. `landmarks`: of those that spoke for the sample, how many are named."""

    index: int
    landmarks: int
    target: int | None
    first_target: int
    targets_limit: int


@dataclass(frozen=True, slots=True)
class Origin:
    """What the results of a job were made from: its method, its target's fingerprint and rows, and units of its stages."""

    method: str | None
    target: str
    target_count: int
    units: Sequence[JobUnit]

    @classmethod
    def of(cls, session: Session, job_id: str) -> Self:
        job = session.get_one(SelectionJob, job_id)
        target = session.get_one(Dataset, job.target_id)
        units = ledger.unit_results(session, job_id, Stage.EMBED, Stage.PROPAGATE, Stage.SELECT)
        return cls(job.parameters.get("method"), target.fingerprint, target.row_count, units)

    @property
    def is_explained(self) -> bool:
        """Whether its stages kept what an explanation needs, which earlier versions did not."""
        return any(unit.stage is Stage.SELECT and "silent_targets" in (unit.result or {}) for unit in self.units)

    def unit(self, stage: Stage) -> JobUnit:
        """The stage's last: where it asked for more landmarks, an earlier one is no longer what counts."""
        return next(unit for unit in reversed(self.units) if unit.stage is stage)

    def shard(self, stage: Stage, row: int) -> JobUnit:
        """The stage's unit that did this row."""
        units = (unit for unit in self.units if unit.stage is stage)
        return next(unit for unit in units if unit.spec["start"] <= row < unit.spec["stop"])


def sample(session: Session, store: ArtifactStore, job: repository.Job, asked: Asked) -> SampleOut:
    """One sample of a job that has succeeded, with its content and its explanation, or why it has none.

    Raises:
        NotFound: the pool has no such sample.
        Unprocessable: the target has no such sample.
    """
    index, count = asked.index, job.pool.row_count
    if not 0 <= index < count:
        raise NotFound(f"The pool has {count} samples, of index 0 to {count - 1}.", param="index")
    origin = Origin.of(session, job.id)
    if asked.target is not None and asked.target >= origin.target_count:
        last = origin.target_count - 1
        raise Unprocessable(f"target: the target has samples of index 0 to {last}.", param="target")
    found = repository.weights(session, job.id, index, index + 1)
    rank = repository.ranks(session, job.id, index, index + 1).get(index)
    ids, sources = storage.read_ids(store, job.pool.fingerprint, index, index + 1)
    content, content_missing = _content(store, job.pool, index)
    explanation, missing = None, None
    try:
        explanation = explained(store, origin, asked, job.pool.fingerprint, found.influence[0], found.exact[0])
    except Unexplained as error:
        missing = str(error)
    return SampleOut(
        job_id=job.id,
        index=index,
        id=ids[0],
        source=sources[0],
        influence=found.influence[0],
        weight=found.weight[0],
        exact=found.exact[0],
        selected=rank is not None,
        rank=rank,
        messages=content.messages if content else None,
        text=content.text if content else None,
        content_missing=content_missing,
        explanation=explanation,
        explanation_missing=missing,
    )


def _content(store: ArtifactStore, pool: Pool, index: int) -> tuple[storage.Sample | None, str | None]:
    if not pool.deleted:
        try:
            return storage.read_samples(store, pool.fingerprint, [index])[0], None
        except FileNotFoundError:  # deleted since the job was looked up
            pass
    return None, f"The pool {pool.id} has been deleted, and its text with it."


def explained(store: ArtifactStore, job: Origin, asked: Asked, pool: str, influence: float, exact: bool) -> Explanation:
    """Explains the influence that was published of a sample. `pool` is the fingerprint of the job's pool.

    Raises:
        Unexplained: the job is of a version that kept less, or what it left has been removed or made anew.
    """
    if job.method == "random":
        return _nothing(_DRAWN)
    if not job.is_explained:
        raise Unexplained(f"The job was computed by a version of Winnow that kept less. {_AGAIN}")
    try:
        return _Sample(store, job, asked, pool).explanation(influence, exact)
    except FileNotFoundError as error:
        raise Unexplained(f"What the job's stages had left has been removed to make room. {_AGAIN}") from error


def _nothing(sentence: str) -> Explanation:
    return Explanation(explained_by="none", sentence=sentence, target=None, influence=0.0, targets=None)


class _Sample:
    def __init__(self, store: ArtifactStore, job: Origin, asked: Asked, pool: str) -> None:
        self._store = store
        self._job = job
        self._asked = asked
        self._pool = pool
        self._selected: dict[str, Any] = job.unit(Stage.SELECT).result or {}
        self._propagated: dict[str, Any] = job.unit(Stage.PROPAGATE).result or {}
        self._counts = np.ones(job.target_count, dtype=bool)
        self._counts[self._selected["silent_targets"]] = False

    def explanation(self, published: float, exact: bool) -> Explanation:
        asked, index = self._asked, self._asked.index
        with self._store.open(self._job.unit(Stage.SELECT).artifact_key) as file:
            if not Tensors(file).row("eligible", index):
                return _nothing(_NOTHING_FINITE if index in self._selected["nonfinite"] else _NO_RESPONSE)
        values = self._on_targets()
        _check(values[self._counts].mean(), published, scale=np.abs(values).mean())
        explained = published if asked.target is None else float(values[asked.target])
        finished = partial(Explanation, target=asked.target, influence=explained, targets=self._targets(values))
        if exact:
            by = "embedding_similarity" if self._job.method == "rds_plus" else "own_gradient"
            return finished(explained_by=by, sentence=_SENTENCES[by])
        landmarks, others = self._landmarks(explained)
        return finished(explained_by="landmarks", sentence=_SENTENCES["landmarks"], landmarks=landmarks, others=others)

    def _on_targets(self) -> Vector:
        """The sample's influence on every target, as its final influence counts it."""
        refined = self._selected["explanation"]
        if refined is not None:
            with self._store.open(refined) as file:
                tensors = Tensors(file)
                rows = tensors.rows("index", 0, tensors.length("index"))
                place = int(np.searchsorted(rows, self._asked.index))
                if place < len(rows) and rows[place] == self._asked.index:
                    return tensors.row("influence", place).astype(np.float64)
        with self._store.open(self._job.unit(Stage.PROPAGATE).artifact_key) as file:
            return npy_row(file, self._asked.index)[: self._job.target_count].astype(np.float64)

    def _targets(self, values: Vector) -> TargetsPage:
        start = self._asked.first_target
        stop = min(start + self._asked.targets_limit, len(values))
        ids, _ = storage.read_ids(self._store, self._job.target, start, stop)
        data = [
            TargetInfluence(index=index, id=id, influence=values[index], counts=bool(self._counts[index]))
            for index, id in enumerate(ids, start)
        ]
        return TargetsPage(data=data, has_more=stop < len(values), last_id=data[-1].index if data else None)

    def _landmarks(self, explained: float) -> tuple[list[LandmarkOut], OtherLandmarks]:
        """Those that contributed most, whichever way, and what all others contributed together."""
        row = 0 if self._asked.target is None else 1 + self._asked.target
        with self._store.open(self._propagated["explanation"]) as file:
            tensors = Tensors(file)
            kernel = self._kernel(tensors)
            contribution = kernel * tensors.row("coefficients", row)
            size = np.abs(contribution)
            _check(contribution.sum(), explained, scale=size.sum())
            first = np.argsort(-size, kind="stable")
            named, others = first[: self._asked.landmarks], first[self._asked.landmarks :]
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
        unit = self._job.shard(Stage.EMBED, self._asked.index)
        with self._store.open(unit.artifact_key) as file:
            own = Tensors(file).row("embeddings", self._asked.index - unit.spec["start"]).astype(np.float64)
        sigma, count = self._propagated["sigma"], landmarks.length("embeddings")
        parts = []
        for start in range(0, count, _ROWS):
            block = landmarks.rows("embeddings", start, min(start + _ROWS, count)).astype(np.float64)
            if sigma is None:
                parts.append(block @ own)
            else:
                parts.append(np.exp(np.square(block - own).sum(axis=1) * (-0.5 / sigma**2)))
        return np.concatenate(parts)


def _check(found: float, published: float, *, scale: float) -> None:
    if not abs(found - published) <= _TOLERANCE * scale:
        raise Unexplained(
            f"What the job's stages had left was removed and made anew since, and its figures differ. {_AGAIN}"
        )
