"""Which rows repeat which: exact repeats by their digests, near ones by bands that they share, each verified.

Rows are looked at in order, and each is compared with rows before it that repeat none themselves: so every member of a group is
near its first row, and no chain of small changes puts two unlike rows together. Nothing depends on how the dataset was cut.

Letters: n rows, m rows that share a band with another one, s buckets (a band key that several rows have).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from service.datasets.storage import Sample
from worker.duplicates.minhash import BANDS, NO_KEY, Hashes, are_near, shingle_hashes, word_hashes
from worker.duplicates.signatures import batches

NONE = -1
_MAX_FIRSTS = 64  # rows that a bucket remembers: of texts from one template all may be in it
_MAX_COMPARED = 32  # rows that a row is compared with: those that it shares most bands with

Rows = npt.NDArray[np.int64]
Samples = Callable[[Rows], Iterable[Sample]]
"""The samples of rising rows."""


def first_of_equal(digests: npt.NDArray[np.uint64]) -> Rows:
    """For each row (n,) the first one with the same digest, maybe itself."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    firsts = np.empty(len(order), np.int64)
    firsts[order] = order[is_first][np.cumsum(is_first) - 1]
    return firsts


@dataclass(frozen=True, slots=True, kw_only=True)
class Near:
    """The search for near duplicates. `keys(band)` are the keys of all rows in a band, uint32 (n,); `is_compared` (n,): which
    rows take part; `samples` reads some of them; `beat` is called now and then and may raise.

    `seeds`: None where rows are compared with one another; else the first `seeds` rows are what the others are compared with.
    """

    keys: Callable[[int], npt.NDArray[np.uint32]]
    is_compared: npt.NDArray[np.bool_]
    samples: Samples
    beat: Callable[[], None]
    folder: Path
    seeds: int | None = None

    def repeated(self) -> Rows:
        """For each row (n,) the row that it is near, or `NONE`."""
        found = np.full(len(self.is_compared), NONE, np.int64)
        candidates = np.flatnonzero(self._are_candidates())
        if not len(candidates):
            return found
        buckets = self._buckets(candidates)
        with _contents(self.folder, self.samples(candidates), self.beat) as contents:
            for place, row in enumerate(candidates.tolist()):
                is_seed = self.seeds is not None and row < self.seeds
                near = None if is_seed else contents.first_near(place, buckets.shared_with(place))
                if near is not None:
                    found[row] = candidates[near]
                elif is_seed or self.seeds is None:
                    buckets.remember(place)
                if place % 1024 == 0:
                    self.beat()
        return found

    def _runs(self, band: int) -> tuple[Rows, Rows]:
        """The rows whose key others have too, by bucket and rising in each; and the bucket of each, counted from 0."""
        keys = self.keys(band)
        rows = np.flatnonzero(self.is_compared & (keys != NO_KEY))
        order = rows[np.argsort(keys[rows], kind="stable")]
        if not len(order):
            return order, order
        starts = np.flatnonzero(np.concatenate([[True], keys[order[1:]] != keys[order[:-1]]]))
        sizes = np.diff(np.append(starts, len(order)))
        is_shared = sizes > 1
        if self.seeds is not None:
            is_shared &= (order[starts] < self.seeds) & (order[starts + sizes - 1] >= self.seeds)
        return order[np.repeat(is_shared, sizes)], np.repeat(np.arange(is_shared.sum()), sizes[is_shared])

    def _are_candidates(self) -> npt.NDArray[np.bool_]:
        are_candidates = np.zeros(len(self.is_compared), dtype=bool)
        for band in range(BANDS):
            are_candidates[self._runs(band)[0]] = True
            self.beat()
        return are_candidates

    def _buckets(self, candidates: Rows) -> "_Buckets":
        of_candidate = np.full((len(candidates), BANDS), NONE, np.int32)
        room, count = [], 0
        for band in range(BANDS):
            rows, bucket = self._runs(band)
            of_candidate[np.searchsorted(candidates, rows), band] = bucket + count
            sizes = np.bincount(bucket)
            room.append(np.minimum(sizes, _MAX_FIRSTS))
            count += len(sizes)
            self.beat()
        ends = np.cumsum(np.concatenate([[0], *room]))
        firsts = np.empty(int(ends[-1]), np.int32)
        return _Buckets(of_candidate, ends, np.zeros(count, np.int32), firsts)


@dataclass(frozen=True, slots=True)
class _Buckets:
    """What rows are compared with. Candidates are named by their places: `of_candidate` (m, BANDS) says in which buckets they
    are; a bucket has room for `firsts[room[s]:room[s + 1]]`, of which `used[s]` are there."""

    of_candidate: npt.NDArray[np.int32]
    room: npt.NDArray[np.int64]
    used: npt.NDArray[np.int32]
    firsts: npt.NDArray[np.int32]

    def shared_with(self, place: int) -> list[int]:
        """Those that are remembered, the ones that share most bands first, and of these the first."""
        counts: dict[int, int] = {}
        for bucket in self._of(place):
            start = self.room[bucket]
            for first in self.firsts[start : start + self.used[bucket]].tolist():
                counts[first] = counts.get(first, 0) + 1
        return sorted(counts, key=lambda first: (-counts[first], first))[:_MAX_COMPARED]

    def remember(self, place: int) -> None:
        for bucket in self._of(place):
            start, used = self.room[bucket], self.used[bucket]
            if start + used < self.room[bucket + 1]:
                self.firsts[start + used] = place
                self.used[bucket] = used + 1

    def _of(self, place: int) -> list[int]:
        return [bucket for bucket in self.of_candidate[place].tolist() if bucket != NONE]


@dataclass(frozen=True, slots=True)
class _Contents:
    """The shingles and the learnt words of the candidates, each a set, in a file one after the other: candidate i has
    [ends[2 i], ends[2 i + 1]) and [ends[2 i + 1], ends[2 i + 2])."""

    file: int
    ends: npt.NDArray[np.int64]

    def first_near(self, place: int, others: list[int]) -> int | None:
        """The first of the others that is a near duplicate: in all that is said and in what is learnt."""
        if not others:
            return None
        shingles, learnt = self._sets(place)
        for other in others:
            its_shingles, its_learnt = self._sets(other)
            if are_near(shingles, its_shingles) and are_near(learnt, its_learnt):
                return other
        return None

    def _sets(self, place: int) -> tuple[Hashes, Hashes]:
        start, middle, stop = self.ends[2 * place : 2 * place + 3].tolist()
        read = np.frombuffer(os.pread(self.file, 8 * (stop - start), 8 * start), np.uint64)
        return read[: middle - start], read[middle - start :]


@contextmanager
def _contents(folder: Path, samples: Iterable[Sample], beat: Callable[[], None]) -> Iterator[_Contents]:
    ends = [0]
    with (folder / "contents").open("w+b") as file:
        for batch in batches(samples):
            words, starts = word_hashes([said.words for said in batch])
            learnt, learnt_starts = word_hashes([said.learnt for said in batch])
            shingles = shingle_hashes(words, starts)
            for i in range(len(batch)):
                for hashes, of in ((shingles, starts), (learnt, learnt_starts)):
                    unique = np.unique(hashes[of[i] : of[i + 1]])
                    file.write(unique.tobytes())
                    ends.append(ends[-1] + len(unique))
            beat()
        file.flush()
        yield _Contents(file.fileno(), np.array(ends, np.int64))
