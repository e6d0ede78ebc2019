"""What was found, as an artifact: for each row of the pool the row that it repeats."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from service.storage.artifacts import ArtifactStore
from worker.duplicates.matching import NONE, Rows, first_of_equal

Search = Callable[[npt.NDArray[np.bool_]], Rows]
"""From which rows take part to the row that each is near, or `NONE`."""


@dataclass(frozen=True, slots=True)
class Repeats:
    """`same_as` int64 (n,): the row that each row of the pool repeats, of the pool or of the target; `NONE` where there is none.
    `is_exact` bool (n,): whether it does so exactly, or an earlier row of the pool of the same group says exactly the same."""

    same_as: Rows
    is_exact: npt.NDArray[np.bool_]

    @classmethod
    def within(cls, digests: npt.NDArray[np.uint64], near: Search) -> Self:
        """Of the rows of a pool, among one another: each repeats the first row of its group."""
        own = np.arange(len(digests))
        equal = first_of_equal(digests)
        found = near(equal == own)
        first = np.where(found == NONE, own, found)[equal]
        return cls(np.where(first == own, NONE, first), equal != own)

    @classmethod
    def of_target(cls, target: npt.NDArray[np.uint64], pool: npt.NDArray[np.uint64], near: Search) -> Self:
        """Of the rows of a pool, with those of the target; `near` looks at the target's rows and then the pool's."""
        t = len(target)
        equal = first_of_equal(np.concatenate([target, pool]))
        is_exact = equal[t:] < t
        is_compared = equal == np.arange(len(equal))
        found = near(is_compared)[equal[t:]]
        return cls(np.where(is_exact, equal[t:], found), is_exact)

    @property
    def is_repeat(self) -> npt.NDArray[np.bool_]:
        return np.not_equal(self.same_as, NONE)

    @property
    def counts(self) -> dict[str, int]:
        """Rows of the pool that repeat one exactly, and nearly; how many others they repeat."""
        exact = int((self.is_repeat & self.is_exact).sum())
        repeated = np.unique(self.same_as[self.is_repeat])
        return {"exact": exact, "near": int(self.is_repeat.sum()) - exact, "repeated": len(repeated)}

    def write(self, store: ArtifactStore, key: str) -> None:
        same_as = pa.array(self.same_as, pa.int64(), mask=~self.is_repeat)
        with store.writing(key) as path:
            pq.write_table(pa.table({"same_as": same_as, "is_exact": self.is_exact}), path, compression="zstd")

    @classmethod
    def read(cls, store: ArtifactStore, key: str) -> Self:
        with store.open(key) as file, pq.ParquetFile(file) as parquet:
            table = parquet.read(use_threads=False)
        same_as = table.column("same_as").fill_null(NONE).to_numpy()
        return cls(same_as.astype(np.int64), table.column("is_exact").to_numpy().astype(bool))
