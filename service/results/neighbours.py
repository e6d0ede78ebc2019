"""A propagated influence in parts that add up and do not cancel (docs/decisions/0025-explain.md).

The regression is a sum over all exact samples, whose terms are large and of both signs. What a person can judge is taken out of
it: the average of the landmarks, by how much the nearest exact samples differ from that, and the correction that remains.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.results.tensor_reader import Tensors

Vector = npt.NDArray[np.float64]

_ROWS = 256  # landmarks at a time: bounds what is read of their embeddings


@dataclass(frozen=True, slots=True)
class Parts:
    """`average` + sum of `contribution` + `correction` is the influence. One entry for each of the nearest exact samples (m,),
    the nearest first: its place in the pool, its own influence, the kernel, and its weight; the weights sum to 1."""

    average: float
    place: npt.NDArray[np.int64]
    influence: Vector
    kernel: Vector
    weight: Vector
    contribution: Vector
    correction: float


def parts(landmarks: Tensors, row: int, kernel: Vector, nearest: int, explained: float) -> Parts:
    """
    Args:
        landmarks: what the propagate stage wrote beside the influence.
        row: of it; 0 for the mean over the targets, else 1 + target.
        kernel: between the sample and each exact sample that spans the regression, (z,).
        explained: the influence that the parts are of.
    """
    place = landmarks.rows("index", 0, len(kernel))
    own = landmarks.row("influence", row).astype(np.float64)
    is_random = np.ones(len(kernel), dtype=bool)
    if "landmarks" in landmarks:  # a shortlist is no fair sample of the pool
        is_random = np.isin(place, landmarks.rows("landmarks", 0, landmarks.length("landmarks")))
    average = float(own[is_random].mean())
    first = np.argsort(-kernel, kind="stable")[:nearest]
    similarity = kernel[first].clip(0)  # of a linear kernel, what points the other way is not near
    weight = similarity / similarity.sum() if similarity.any() else np.full(len(first), 1 / max(len(first), 1))
    contribution = weight * (own[first] - average)
    correction = explained - average - float(contribution.sum())
    return Parts(average, place[first], own[first], kernel[first], weight, contribution, correction)


def kernel_of(landmarks: Tensors, own: Vector, propagated: Mapping[str, Any]) -> Vector:
    """The kernel between a sample and each landmark (METHOD 2), in float64 as it was fitted.

    Args:
        own: the sample's embedding (e,); `propagated`: the result of the propagate stage.
    """
    sigma, count = propagated["sigma"], landmarks.length("embeddings")
    found = []
    for start in range(0, count, _ROWS):
        block = landmarks.rows("embeddings", start, min(start + _ROWS, count)).astype(np.float64)
        if sigma is None:
            found.append(block @ own)
        else:
            squared = np.square(block - own).sum(axis=1)
            is_laplacian = propagated.get("kernel") == "laplacian"  # not there in results of earlier versions
            found.append(np.exp(np.sqrt(squared) / -sigma if is_laplacian else squared * (-0.5 / sigma**2)))
    return np.concatenate(found)
