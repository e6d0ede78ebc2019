"""First-order influence of samples on targets (METHOD 2; arXiv 2505.19051, section 3).

Shape suffixes: n samples, t targets, k gradient values.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096
"""Rows converted at a time: the float64 copy of a large gradient store would double its memory."""


def cosine_influence(G: Tensor, G_T: Tensor, normalize: bool = True) -> Tensor:
    """Influence P = G G_TT of every sample on every target: (n, k), (t, k) -> (n, t), in the dtype of G.

    With `normalize` both sides are scaled to unit length first, which makes it the cosine; without, it is the plain inner product
    that the weighting objective needs. A zero gradient has influence 0. Raises ValueError where the k differ.
    """
    if G.ndim != 2 or G_T.ndim != 2 or G.shape[1] != G_T.shape[1]:
        raise ValueError(f"gradients must be (n, k) and (t, k), not {tuple(G.shape)} and {tuple(G_T.shape)}")
    targets_tk = _unit_rows(G_T.double()) if normalize else G_T.double()
    P_nt = torch.empty(G.shape[0], G_T.shape[0], dtype=G.dtype, device=G.device)
    for start in range(0, G.shape[0], ROWS):
        rows_Rk = G[start : start + ROWS].double()
        P_nt[start : start + ROWS] = (_unit_rows(rows_Rk) if normalize else rows_Rk) @ targets_tk.T
    return P_nt


def _unit_rows(x_Rk: Tensor) -> Tensor:
    norm_R1 = x_Rk.norm(dim=1, keepdim=True)
    return x_Rk / torch.where(norm_R1 > 0, norm_R1, 1.0)
