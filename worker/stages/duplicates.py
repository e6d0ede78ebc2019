"""Which rows of the pool repeat one another or the target, and which of them the job leaves out: part of the prepare stage.

The signatures of a shard are made with its tokens, or here where they are not there; what was found is kept for the pool, and for
the pool with the target, so that the next job reads it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.datasets import storage
from service.plan.artifact_keys import artifact_key
from service.plan.stages import Stage
from service.storage.artifacts import ArtifactStore
from service.storage.tempdirs import temporary_directory
from worker.duplicates import exclusions, signatures
from worker.duplicates.matching import Near, Rows
from worker.duplicates.minhash import BANDS
from worker.duplicates.repeats import Repeats
from worker.duplicates.signatures import signatures_key, signatures_of
from worker.stages.context import StageContext


@dataclass(frozen=True, slots=True)
class Found:
    """`duplicates` within the pool and its `overlap` with the target; `keys` name their artifacts, and `signatures` those that
    they were found by."""

    duplicates: Repeats
    overlap: Repeats
    keys: dict[str, str]
    signatures: list[str]

    @property
    def counts(self) -> dict[str, Any]:
        """For the result of the stage."""
        return {"duplicates": self.duplicates.counts, "overlap": self.overlap.counts}


@dataclass(frozen=True)
class PoolRepeats:
    """The search in the job's pool, cut into `shards`; `beat` is called now and then and may raise."""

    context: StageContext
    shards: Sequence[tuple[int, int]]
    beat: Callable[[], None]

    @property
    def _store(self) -> ArtifactStore:
        return self.context.store

    @cached_property
    def signatures(self) -> list[str]:
        """The keys of the shards' signatures."""
        return [signatures_key(self.context.job.pool, rows, self.context.job.salt) for rows in self.shards]

    def find(self) -> Found:
        job = self.context.job
        salted = {} if job.salt is None else {"salt": job.salt}
        keys = {
            "duplicates": artifact_key(Stage.PREPARE, "duplicates", ".parquet", pool=job.pool, **salted),
            "overlap": artifact_key(Stage.PREPARE, "overlaps", ".parquet", pool=job.pool, target=job.target, **salted),
        }
        missing = {name: key for name, key in keys.items() if not self._store.is_whole(key)}
        if missing:
            with self._pool() as pool:
                if key := missing.get("duplicates"):
                    self._within(pool).write(self._store, key)
                if key := missing.get("overlap"):
                    self._with_target(pool).write(self._store, key)
        duplicates, overlap = (Repeats.read(self._store, keys[name]) for name in ("duplicates", "overlap"))
        return Found(duplicates, overlap, keys, self.signatures)

    def make_signatures(self) -> None:
        """Of the shards that have none."""
        for rows, key in zip(self.shards, self.signatures, strict=True):
            if not self._store.is_whole(key):
                write_signatures(self.context, rows, self.beat)

    @contextmanager
    def _pool(self) -> Iterator["_Pool"]:
        """The shards' signatures together: digests in memory, band after band in files."""
        self.make_signatures()
        with temporary_directory(self._store.temporary_folder) as folder:
            digests = []
            for key in self.signatures:
                shard = signatures.read(self._store, key)
                digests.append(shard.digests)
                for band in range(BANDS):
                    with (folder / f"band-{band}").open("ab") as file:
                        file.write(shard.keys[band].tobytes())
                self.beat()
            yield _Pool(np.concatenate(digests), folder)

    def _within(self, pool: "_Pool") -> Repeats:
        def near(is_compared: npt.NDArray[np.bool_]) -> Rows:
            return Near(
                keys=pool.keys, is_compared=is_compared, samples=self._of_pool, beat=self.beat, folder=pool.folder
            ).repeated()

        return Repeats.within(pool.digests, near)

    def _with_target(self, pool: "_Pool") -> Repeats:
        target = signatures_of(storage.iter_samples(self._store, self.context.job.target), self.beat)
        t = len(target.digests)

        def samples(rows: Rows) -> Iterator[storage.Sample]:
            yield from _read(self._store, self.context.job.target, rows[rows < t])
            yield from self._of_pool(rows[rows >= t] - t)

        def near(is_compared: npt.NDArray[np.bool_]) -> Rows:
            return Near(
                keys=lambda band: np.concatenate([target.keys[band], pool.keys(band)]),
                is_compared=is_compared,
                samples=samples,
                beat=self.beat,
                folder=pool.folder,
                seeds=t,
            ).repeated()

        return Repeats.of_target(target.digests, pool.digests, near)

    def _of_pool(self, rows: Rows) -> Iterable[storage.Sample]:
        return _read(self._store, self.context.job.pool, rows)


@dataclass(frozen=True, slots=True)
class _Pool:
    digests: npt.NDArray[np.uint64]
    folder: Path

    def keys(self, band: int) -> npt.NDArray[np.uint32]:
        return np.fromfile(self.folder / f"band-{band}", np.uint32)


def _read(store: ArtifactStore, dataset: str, rows: Rows) -> Iterator[storage.Sample]:
    """The samples of rising rows, of one row group at a time."""
    ends = np.cumsum(storage.group_sizes(store, dataset)[0])
    for group in np.split(rows, np.searchsorted(rows, ends)):
        if len(group):
            yield from storage.read_samples(store, dataset, group.tolist())


def write_signatures(context: StageContext, rows: tuple[int, int], beat: Callable[[], None]) -> str:
    """Makes those of the rows [start, stop) of the pool; returns their key."""
    job = context.job
    key = signatures_key(job.pool, rows, job.salt)
    samples = storage.iter_samples(context.store, job.pool, *rows)
    signatures.write(context.store, key, signatures_of(samples, beat))
    return key


def exclude(
    context: StageContext, pool_tokens: str, usable: npt.NDArray[np.bool_], found: Found
) -> dict[str, Any] | None:
    """What the job leaves out of the usable rows: the `key` of its artifact, and how many rows for which reason; None where it
    leaves out nothing. The key names only what has an effect, so that a job on a pool without repeats is the same with and
    without the options."""
    numbers = exclusions.excluded(context.job.parameters, usable, found.duplicates, found.overlap)
    counts = {reason: int((numbers == number).sum()) for number, reason in enumerate(exclusions.REASONS, 1)}
    of = {"duplicate": found.keys["duplicates"], "overlap": found.keys["overlap"]}
    depends_on = {reason: of[reason] for reason, count in counts.items() if count}
    if not depends_on:
        return None
    key = artifact_key(Stage.PREPARE, "exclusions", ".npy", pool=pool_tokens, **depends_on)
    if not context.store.is_whole(key):
        exclusions.write(context.store, key, numbers)
    return {"key": key, "count": sum(counts.values()), "by_reason": counts}
