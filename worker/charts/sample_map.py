"""The map of a pool: some of its samples as points, by the two principal components of their embeddings."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from service.plan.stages import Done
from service.results.chart_schemas import MAP_SAMPLES, MAP_SELECTED, SampleMap
from service.results.tensor_reader import Tensors
from service.storage.artifacts import ArtifactStore
from worker.charts.samples import Ints, PoolSamples, even_part, figures

_WIDTH = 512
"""Of a row; a wider one is first projected to so many random directions, which keeps distances to a few per cent."""
_DRAW = 0x3A9

Matrix = npt.NDArray[np.float32]


def sample_map(
    store: ArtifactStore, samples: PoolSamples, embeddings: Sequence[Done], influence: tuple[str, int] | None, seed: int
) -> SampleMap | None:
    """
    Args:
        embeddings: units of the embed stage, in order.
        influence: key of the influence on each target and the number of targets; takes their place where there are none.
    """
    index = _shown(samples, seed)
    if embeddings:
        rows = np.concatenate(list(_embedding_rows(store, embeddings, index, seed)))
    elif influence is not None:
        key, targets = influence
        with store.local(key) as path:
            rows = _projected(np.load(path, mmap_mode="r")[index, :targets], seed)
    else:
        return None
    points, shares = principal_components(rows)
    return SampleMap(
        of="embedding" if embeddings else "influence",
        shares=figures(shares),
        count=int(samples.eligible.sum()),
        index=index.tolist(),
        x=figures(points[:, 0]),
        y=figures(points[:, 1]),
        influence=figures(samples.influence[index]),
        selected=samples.is_selected[index].tolist(),
    )


def _shown(samples: PoolSamples, seed: int) -> Ints:
    """Rising indices: the selected, of many an even part, and others of those that took part, drawn at random."""
    selected = even_part(samples.selected, MAP_SELECTED)
    others = np.flatnonzero(samples.eligible & ~samples.is_selected)
    generator = np.random.default_rng([seed, _DRAW])
    drawn = generator.choice(others, size=min(len(others), MAP_SAMPLES - len(selected)), replace=False)
    return np.sort(np.concatenate([selected, drawn]))


def _embedding_rows(store: ArtifactStore, shards: Sequence[Done], index: Ints, seed: int) -> Iterator[Matrix]:
    """The rows of the rising indices, float32, a shard at a time."""
    for shard in shards:
        start, stop = shard.spec["start"], shard.spec["stop"]
        low, high = np.searchsorted(index, [start, stop])
        if low < high:
            with store.open(shard.artifact_key) as file:
                tensors = Tensors(file)
                rows = np.stack([tensors.row("embeddings", row) for row in (index[low:high] - start).tolist()])
            yield _projected(rows, seed)


def _projected(rows: npt.NDArray[np.floating], seed: int) -> Matrix:
    if rows.shape[1] <= _WIDTH:
        return rows.astype(np.float32)
    generator = np.random.default_rng([seed, _DRAW, rows.shape[1]])
    directions = generator.standard_normal((rows.shape[1], _WIDTH), dtype=np.float32)
    return rows.astype(np.float32) @ directions / np.float32(np.sqrt(_WIDTH))


def principal_components(rows: Matrix) -> tuple[npt.NDArray[np.float64], list[float]]:
    """The coordinates (m, 2) of rows (m, e) along the two directions of their largest variance, and the share that each has of
    the variance. Of each direction that one of the two signs is taken by which its largest component is positive."""
    centred = rows.astype(np.float64)
    centred -= centred.mean(axis=0)
    variances, directions = np.linalg.eigh(centred.T @ centred)
    axes = np.zeros((rows.shape[1], 2))
    found = directions[:, ::-1][:, :2]
    axes[:, : found.shape[1]] = found * np.sign(found[np.abs(found).argmax(axis=0), np.arange(found.shape[1])])
    total = variances.clip(0).sum()
    shares = [max(float(value), 0.0) / total if total > 0 else 0.0 for value in [*variances[::-1][:2], 0.0][:2]]
    return centred @ axes, shares
