"""Kernels of the regression from embeddings to influence: matrices of them, and the width that distances suggest (METHOD 2)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Kernel = Literal["rbf", "laplacian", "linear"]

BY_DISTANCE: tuple[Kernel, ...] = ("rbf", "laplacian")
"""The kernels that are functions of the distance: what `auto` chooses among."""


def kernel_matrix(kernel: Kernel, X_me: Tensor, Y_le: Tensor, sigma: float | None) -> Tensor:
    """Kernel between rows, (m, e), (l, e) -> (m, l): `rbf` exp(-|x - y|² / 2σ²), `laplacian` exp(-|x - y| / σ), `linear` x·y."""
    if sigma is None:
        return X_me @ Y_le.T
    return of_squared_distances(kernel, squared_distances(X_me, Y_le), sigma)


def of_squared_distances(kernel: Kernel, squared_ml: Tensor, sigma: float) -> Tensor:
    """A kernel of the distance from squared distances, in place."""
    if kernel == "laplacian":
        return squared_ml.sqrt_().mul_(-1 / sigma).exp_()
    return squared_ml.mul_(-0.5 / sigma**2).exp_()


def squared_distances(X_me: Tensor, Y_le: Tensor) -> Tensor:
    """Between rows, (m, e), (l, e) -> (m, l); 0 where they do not differ."""
    squared_l = Y_le.square().sum(dim=1)
    # Below this a difference is the rounding of |x|² + |y|² - 2 x·y, not a distance; its root would be one.
    noise = 64 * torch.finfo(Y_le.dtype).eps * float(squared_l.max())
    squared_ml = X_me.square().sum(dim=1)[:, None] + squared_l
    squared_ml = squared_ml.addmm_(X_me, Y_le.T, alpha=-2.0)
    return nn.functional.threshold(squared_ml, noise, 0.0, inplace=True)


def median_distance(squared_ll: Tensor) -> float:
    """Median distance between rows that differ, 1 where none do; that each pair is there twice leaves a median what it is."""
    squared = squared_ll.numpy(force=True)
    apart = squared[squared > 0]
    return float(np.sqrt(np.median(apart, overwrite_input=True))) if apart.size else 1.0


def plain_kernel(kernel: Kernel, X_me: Tensor, Y_le: Tensor, sigma: float | None) -> Tensor:
    """What `kernel_matrix` gives, by the formula, one pair at a time."""

    def pair(x: Tensor, y: Tensor) -> Tensor:
        if sigma is None:
            return x @ y
        if kernel == "laplacian":
            return torch.exp(-(x - y).norm() / sigma)
        return torch.exp(-(x - y).square().sum() / (2 * sigma**2))

    return torch.stack([torch.stack([pair(x, y) for y in Y_le]) for x in X_me])
