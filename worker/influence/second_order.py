"""The factors of the second-order objective f(w) = -pᵀw + (η/2) wᵀQw, Q = B M Bᵀ (METHOD 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from .batching import Progress
from .causal_lm import accumulation_dtype, layer_size, linear_layers, parameter_dtype
from .errors import UnusableInput
from .exact_gradients import directional_derivatives, weighted_gradients
from .hessian_vector_products import Curvature, Layers, curvature_products
from .optimizers import Scaling
from .projection import GradientProjection, seeded_generator
from .samples import Samples

Kind = Literal["fisher", "ggn", "hessian"]

DIRECTION_BYTES = 2 * 2**30
"""Directions are made for as many at a time as keeps them and what is computed from them near this size."""


def low_rank(G_lk: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors of landmark gradients and how they are made of them: (U (l, r), V (r, k)) with V = UᵀG.

    V has orthonormal rows, r <= rank: fewer where the spectrum ends, by randomised subspace iteration with a seeded start
    (exact where rank is min(l, k)). float64. Raises ValueError for a rank below 1, UnusableInput where all gradients are 0.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    full = min(G_lk.shape)
    generator = seeded_generator(seed, "landmark directions")
    start_lr = torch.from_numpy(generator.standard_normal((G_lk.shape[0], min(rank + 8, full)))).to(G_lk.device)
    X_lr = torch.linalg.qr(start_lr).Q
    for _ in range(6):
        X_lr = torch.linalg.qr((G_lk @ (G_lk.mT @ X_lr.to(G_lk.dtype))).double()).Q
    A_rr, sigma_r, V_rk = torch.linalg.svd((X_lr.to(G_lk.dtype).mT @ G_lk).double(), full_matrices=False)
    # Below this a direction is rounding of the others.
    kept = min(int((sigma_r > sigma_r.max() * torch.finfo(G_lk.dtype).eps * max(G_lk.shape)).sum()), rank)
    if not kept:
        raise UnusableInput("all landmark gradients are zero: there is no direction to measure curvature in")
    return X_lr @ (A_rr[:, :kept] / sigma_r[:kept]), V_rk[:kept]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SecondOrder:
    """What the curvature of some targets' mean loss adds to the objective, for `ggn` and `hessian`.

    M_rr: (r, r) float64, symmetric: v_iᵀHv_j of the directions, in the full parameter space.
    asymmetry: of M before it was made symmetric, |M - Mᵀ| / |M|; rounding, so large where the dtype is too short.
    Hb_k: (k,) the projected Hb, where the step has an offset b.
    """

    M_rr: Tensor
    asymmetry: float
    Hb_k: Tensor | None


def second_order_terms(
    model: Any,
    landmarks: Samples,
    targets: Sequence[Samples],
    *,
    kind: Curvature,
    coefficients: Tensor,
    scaling: Scaling | None,
    offset: Layers | None,
    projection: GradientProjection | None,
    modules: str = "down_proj",
    direction_bytes: int = DIRECTION_BYTES,
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> list[SecondOrder]:
    """M and Hb of each set of targets for directions v_j = a ⊙ Σ_i U_ij g_i, U = `coefficients` (l, r) of `low_rank` (METHOD 1).

    A direction is the gradient of a weighted landmark loss, so it costs no stored gradients; and v_iᵀHv_j is the derivative of
    those losses along a ⊙ Hv_j, so M needs neither all directions at once nor the projection, whose noise can exceed the
    curvature. With B the samples' projected scaled gradients times Vᵀ then Q = B M Bᵀ / n (`quadratic_factors`), and
    p = G_S D_a (g_T - η Hb) (`offset_influence`). Directions are made in chunks whose memory, 4 values a weight and direction,
    stays near `direction_bytes`, one direction at least; each chunk costs a backward pass over the landmarks, and for each set of
    targets another one and a call of `curvature_products`. `progress` is over the directions. `token_budget` is that of the
    landmarks' batches, the targets' is a quarter of it.

    Raises as the functions it calls, and ValueError where the coefficients are not one row a landmark.
    """
    if coefficients.ndim != 2 or coefficients.shape[0] != len(landmarks):
        raise ValueError(f"coefficients must be ({len(landmarks)}, r), not {tuple(coefficients.shape)}")
    quarter = None if token_budget is None else max(token_budget // 4, 1)
    product = partial(curvature_products, model, kind=kind, modules=modules, token_budget=quarter)
    weights = sum(out * into for out, into in map(layer_size, linear_layers(model, modules).values()))
    step = max(direction_bytes // (4 * weights * accumulation_dtype(parameter_dtype(model)).itemsize), 1)
    rank = coefficients.shape[1]
    M_rr = [torch.empty(rank, rank, dtype=torch.float64) for _ in targets]
    for start in range(0, rank, step):
        part = slice(start, start + step)
        U_lc = coefficients[:, part]
        v_cOI = _scaled(scaling, weighted_gradients(model, landmarks, U_lc, modules=modules, token_budget=token_budget))
        for M, chosen in zip(M_rr, targets, strict=True):
            ahv_cOI = _scaled(scaling, product(chosen, v_cOI))
            D_lc = directional_derivatives(model, landmarks, ahv_cOI, modules=modules, token_budget=token_budget)
            M[:, part] = coefficients.double().T @ D_lc.double()
        if progress is not None:
            progress(min(start + step, rank), rank)
    terms = []
    for M, chosen in zip(M_rr, targets, strict=True):
        Hb_k = None
        if offset is not None:
            Hb_k = projected(product(chosen, {name: b_OI[None] for name, b_OI in offset.items()}), projection)[0]
        asymmetry = float((M - M.T).norm() / M.norm()) if M.any() else 0.0
        terms.append(SecondOrder(M_rr=(M + M.T) / 2, asymmetry=asymmetry, Hb_k=Hb_k))
    return terms


def _scaled(scaling: Scaling | None, layers: Layers) -> Layers:
    return layers if scaling is None else {name: scaling.times(name, value) for name, value in layers.items()}


def projected(layers: Layers, projection: GradientProjection | None) -> Tensor:
    """Full values (c, O, I) by layer name in the layout of `per_sample_gradients`: (c, k) on the CPU, projected alike."""
    sizes = {name: (value_cOI.shape[1], value_cOI.shape[2]) for name, value_cOI in layers.items()}
    if projection is None or not projection.reduces(sizes.values()):
        return torch.cat([value_cOI.flatten(1).cpu() for value_cOI in layers.values()], dim=1)
    parts = [projection.layer(name, *sizes[name]).to(value).apply(value).cpu() for name, value in layers.items()]
    return torch.stack(parts).sum(dim=0)


def quadratic_factors(
    kind: Kind, *, n: int, P_nt: Tensor | None = None, B_nr: Tensor | None = None, M_rr: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(B (n, r), M (r, r)) with Q = B M Bᵀ, float64 (METHOD 1).

    `n` is the number of samples that share the step, Σw = n: those among which the weights are chosen (the shortlist, where there
    is one), not the pool. Q has 1 / n because a step is the mean of w_i g_i over them.
    `fisher` takes P (n, t), the plain scaled inner products with every target: Q = P Pᵀ / (n t), positive semidefinite. `ggn` and
    `hessian` take B = G Vᵀ, G the projected scaled gradients (n, k), and M of `second_order_terms`; M is positive semidefinite
    for `ggn` but for rounding, and may be indefinite for `hessian`. Raises ValueError where the kind's arrays are missing.
    """
    if kind == "fisher" and P_nt is not None:
        return P_nt.double(), torch.eye(P_nt.shape[1], dtype=torch.float64) / (n * P_nt.shape[1])
    if kind != "fisher" and B_nr is not None and M_rr is not None:
        return B_nr.double(), M_rr.double() / n
    raise ValueError(f"curvature {kind} needs {'P_nt' if kind == 'fisher' else 'B_nr and M_rr'}")


def offset_influence(
    kind: Kind,
    *,
    P_nt: Tensor | None = None,
    Gb_t: Tensor | None = None,
    G_nk: Tensor | None = None,
    Hb_k: Tensor | None = None,
) -> Tensor:
    """G_S D_a Hb, what momentum and weight decay take from p: p - η times this, (n,) float64 (METHOD 1).

    `fisher`: P (G_T b) / t, `Gb_t` = G_T b being the `directional_derivatives` of the targets along b. `ggn` and `hessian`: the
    projected scaled gradients G (n, k) times Hb of `second_order_terms`. Raises ValueError where the kind's arrays are missing.
    """
    if kind == "fisher" and P_nt is not None and Gb_t is not None:
        return P_nt.double() @ Gb_t.double() / len(Gb_t)
    if kind != "fisher" and G_nk is not None and Hb_k is not None:
        return G_nk.double() @ Hb_k.double()
    raise ValueError(f"curvature {kind} needs {'P_nt and Gb_t' if kind == 'fisher' else 'G_nk and Hb_k'}")
