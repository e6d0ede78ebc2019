"""The samples of a pool as arrays, and how figures are written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from service.datasets.storage import iter_id_tables
from service.datasets.values import NO_SOURCE
from service.storage.artifacts import ArtifactStore

_ROWS = 16_384
_NAMED_SOURCES = 1_000
_DIGITS = 5

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSamples:
    """One entry a sample of the pool, (n,); `selected` are indices (k,) by rank.

    eligible: took part.  influence: float32, NaN where it did not take part.  has_influence: whether the method computes one.
    source: place in `names`, in which the first thousand sources stand; the number of names: all that came later.
    """

    influence: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    exact: npt.NDArray[np.bool_]
    eligible: npt.NDArray[np.bool_]
    selected: Ints
    length: npt.NDArray[np.int32]
    source: npt.NDArray[np.int16]
    names: tuple[str, ...]
    has_influence: bool

    @classmethod
    def read(
        cls,
        store: ArtifactStore,
        pool: str,
        tokens: str,
        arrays: Mapping[str, npt.NDArray[Any]],
        *,
        has_influence: bool,
    ) -> Self:
        """
        Args:
            pool: its fingerprint; `tokens`: the key of its tokens.
            arrays: what the select stage wrote.
        """
        with store.open(tokens) as file, pq.ParquetFile(file) as parquet:
            length = parquet.read(columns=["length"], use_threads=False).column("length").to_numpy()
        source, names = _sources(store, pool, len(length))
        given = {name: arrays[name] for name in ("influence", "weight", "exact", "eligible", "selected")}
        return cls(**given, length=length, source=source, names=names, has_influence=has_influence)

    @property
    def is_selected(self) -> npt.NDArray[np.bool_]:
        selected = np.zeros(len(self.influence), dtype=bool)
        selected[self.selected] = True
        return selected


def _sources(store: ArtifactStore, pool: str, count: int) -> tuple[npt.NDArray[np.int16], tuple[str, ...]]:
    places: dict[str, int] = {}
    codes, start = np.empty(count, np.int16), 0
    for table in iter_id_tables(store, pool, 0, _ROWS):
        column = table.column("source").fill_null(NO_SOURCE).dictionary_encode().unify_dictionaries().combine_chunks()
        names = column.dictionary.to_pylist()
        for name in names:
            if len(places) < _NAMED_SOURCES:
                places.setdefault(name, len(places))
        known = np.array([places.get(name, _NAMED_SOURCES) for name in names], np.int16)
        codes[start : start + len(table)] = known[column.indices.to_numpy()]
        start += len(table)
    codes[codes == _NAMED_SOURCES] = len(places)
    return codes, tuple(places)


def rounded(value: Any) -> float:
    return float(f"{float(value):.{_DIGITS}g}")


def figures(values: npt.ArrayLike) -> list[float]:
    """As JSON: each rounded to five significant digits."""
    return [rounded(value) for value in np.asarray(values, np.float64).tolist()]


def even_part(values: npt.NDArray[Any], most: int) -> npt.NDArray[Any]:
    """At most so many of the values, evenly spread over them."""
    count = min(len(values), most)
    return values[np.arange(count) * len(values) // max(count, 1)]
