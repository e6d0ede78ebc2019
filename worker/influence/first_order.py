"""First-order influence of samples on targets (METHOD 2; arXiv 2505.19051, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096
"""Rows converted at a time: the float64 copy of a large gradient store would double its memory."""


def cosine_influence(G_nk: Tensor, G_tk: Tensor, normalize: bool = True) -> Tensor:
    """Influence P = G G_Tᵀ of every sample on every target: (n, k), (t, k) -> (n, t), in the dtype of G_nk.

    With `normalize` both sides are scaled to unit length first, which makes it the cosine; without, it is the plain inner product
    that the weighting objective needs. A zero gradient has influence 0. Raises ValueError where the k differ.
    """
    if G_nk.ndim != 2 or G_tk.ndim != 2 or G_nk.shape[1] != G_tk.shape[1]:
        raise ValueError(f"gradients must be (n, k) and (t, k), not {tuple(G_nk.shape)} and {tuple(G_tk.shape)}")
    rows = unit_rows if normalize else torch.Tensor.double
    target_tk = rows(G_tk)
    P_nt = G_nk.new_empty(len(G_nk), len(G_tk))
    for start in range(0, len(G_nk), ROWS):
        P_nt[start : start + ROWS] = rows(G_nk[start : start + ROWS]) @ target_tk.T
    return P_nt


def unit_rows(x_mk: Tensor) -> Tensor:
    """Rows of length one, float64; zero where they were zero."""
    x_mk = x_mk.double()
    norm_m1 = x_mk.norm(dim=1, keepdim=True)
    return x_mk / torch.where(norm_m1 > 0, norm_m1, 1.0)
