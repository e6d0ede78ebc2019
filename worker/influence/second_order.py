"""The factors of the second-order objective f(w) = -pTw + eta/2 wT Q w, Q = B M BT (METHOD 1).

Shape suffixes: n samples, t targets, l landmarks, r directions, c directions of a chunk, k projected gradient values,
O and I layer output and input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .batching import Progress
from .curvature import Curvature, Layers, curvature_products
from .gradients import directional_derivatives, weighted_gradients
from .models import accumulation_dtype, linear_layers, linear_size, parameter_dtype
from .optimizers import Scaling
from .projection import GradientProjection, seeded_generator
from .samples import Samples

Kind = Literal["fisher", "ggn", "hessian"]

DIRECTION_BYTES = 2 * 2**30
"""Directions are made for as many at a time as keeps them and what is computed from them near this size."""


def low_rank(G_lk: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors of landmark gradients and how they are made of them: (U (l, r), V (r, k)) with V = UT G.

    V has orthonormal rows, r <= rank: fewer where the spectrum ends, by randomised subspace iteration with a seeded start
    (exact where rank is min(l, k)). float64. Raises ValueError where every gradient is zero or rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    full = min(G_lk.shape)
    generator = seeded_generator(seed, "landmark directions")
    start_lr = torch.from_numpy(generator.standard_normal((G_lk.shape[0], min(rank + 8, full)))).to(G_lk.device)
    X_lr = torch.linalg.qr(start_lr).Q
    for _ in range(6):
        X_lr = torch.linalg.qr((G_lk @ (G_lk.mT @ X_lr.to(G_lk.dtype))).double()).Q
    A_rr, S_r, V_rk = torch.linalg.svd((X_lr.to(G_lk.dtype).mT @ G_lk).double(), full_matrices=False)
    # Below this a direction is rounding of the others.
    kept = min(int((S_r > S_r.max() * torch.finfo(G_lk.dtype).eps * max(G_lk.shape)).sum()), rank)
    if not kept:
        raise ValueError("all landmark gradients are zero: there is no direction to measure curvature in")
    return X_lr @ (A_rr[:, :kept] / S_r[:kept]), V_rk[:kept]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SecondOrder:
    """What curvature adds to the objective, for `ggn` and `hessian`.

    M_rr: (r, r) float64, symmetric: v_iT H v_j of the directions v_j, in the full parameter space.
    asymmetry: of M before it was made symmetric, ||M - MT|| / ||M||; rounding, so large where the dtype is too short.
    Hb_k: (k,) the projected H b, where the step has an offset b.
    """

    M_rr: Tensor
    asymmetry: float
    Hb_k: Tensor | None


def second_order_terms(
    model: Any,
    landmarks: Samples,
    targets: Samples,
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
) -> SecondOrder:
    """M and H b for directions v_j = a * sum_i U_ij g_i, U = `coefficients` (l, r) of `low_rank` (METHOD 1).

    A direction is the gradient of a weighted landmark loss, so it costs no stored gradients; and v_iT H v_j is the derivative of
    those losses along a * H v_j, so M needs neither all directions at once nor the projection, whose noise can exceed the
    curvature. With B the samples' projected scaled gradients @ VT then Q = B M BT / n (`quadratic_factors`), and
    p = G_S D_a (g_T - eta H b) (`offset_influence`). Directions are made in chunks whose memory, 4 values a weight and direction,
    stays near `direction_bytes`, one direction at least; each chunk costs two backward passes over the landmarks and one call of
    `curvature_products`. `progress` is over the directions. `token_budget` is that of the landmarks' batches, the targets' is a
    quarter of it.

    Raises ValueError as the functions it calls, and where the coefficients are not one row a landmark.
    """
    if coefficients.ndim != 2 or coefficients.shape[0] != len(landmarks):
        raise ValueError(
            f"coefficients must be ({len(landmarks)}, r), a row a landmark, not {tuple(coefficients.shape)}"
        )
    chosen = linear_layers(model, modules)
    scaled = partial(_scaled, scaling)
    turned = partial(
        curvature_products,
        model,
        targets,
        kind=kind,
        modules=modules,
        token_budget=None if token_budget is None else max(token_budget // 4, 1),
    )
    rank = coefficients.shape[1]
    step = _chunk(chosen, accumulation_dtype(parameter_dtype(model)), direction_bytes)
    M_rr = torch.empty(rank, rank, dtype=torch.float64)
    for start in range(0, rank, step):
        part = slice(start, start + step)
        directions = weighted_gradients(
            model, landmarks, coefficients[:, part], modules=modules, token_budget=token_budget
        )
        turned_cOI = scaled(turned(scaled(directions)))
        del directions
        D_lc = directional_derivatives(model, landmarks, turned_cOI, modules=modules, token_budget=token_budget)
        M_rr[:, part] = coefficients.double().T @ D_lc.double()
        if progress is not None:
            progress(min(start + step, rank), rank)
    asymmetry = float((M_rr - M_rr.T).norm() / M_rr.norm()) if M_rr.any() else 0.0
    Hb_k = None
    if offset is not None:
        Hb_k = projected(turned({name: b_OI[None] for name, b_OI in offset.items()}), projection)[0]
    return SecondOrder(M_rr=(M_rr + M_rr.T) / 2, asymmetry=asymmetry, Hb_k=Hb_k)


def _scaled(scaling: Scaling | None, layers: Layers) -> Layers:
    return layers if scaling is None else {name: scaling.times(name, value) for name, value in layers.items()}


def _chunk(chosen: Mapping[str, nn.Module], dtype: torch.dtype, direction_bytes: int) -> int:
    """How many directions are made at a time."""
    sizes = [linear_size(module) or (0, 0) for module in chosen.values()]
    values = sum(out * into for out, into in sizes)
    return max(direction_bytes // (4 * values * dtype.itemsize), 1)


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
    """(B (n, r), M (r, r)) with Q = B M BT over a pool of n samples, float64 (METHOD 1).

    `fisher` takes P (n, t), the plain scaled inner products with every target: Q = P PT / (n t), positive semidefinite. `ggn` and
    `hessian` take B = G VT, G the projected scaled gradients (n, k), and M of `second_order_terms`; M is positive semidefinite
    for `ggn` but for rounding, and may be indefinite for `hessian`. `n` is the pool's size, also where B or P hold a part of it
    only. Raises ValueError where the kind's arrays are missing.
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
    slopes_t: Tensor | None = None,
    G_nk: Tensor | None = None,
    Hb_k: Tensor | None = None,
) -> Tensor:
    """G_S D_a H b, what momentum and weight decay take from p: p - learning_rate * this, (n,) float64 (METHOD 1).

    `fisher`: P (G_T b) / t, `slopes_t` = G_T b being the `directional_derivatives` of the targets along b. `ggn` and `hessian`:
    the projected scaled gradients G (n, k) times H b of `second_order_terms`. Raises ValueError where the kind's arrays are
    missing.
    """
    if kind == "fisher" and P_nt is not None and slopes_t is not None:
        return P_nt.double() @ slopes_t.double() / len(slopes_t)
    if kind != "fisher" and G_nk is not None and Hb_k is not None:
        return G_nk.double() @ Hb_k.double()
    raise ValueError(f"curvature {kind} needs {'P_nt and slopes_t' if kind == 'fisher' else 'G_nk and Hb_k'}")
