"""The numerical stages of a job on one model: how each runs on given samples, its operations, and its plain implementation.

Symbols as in docs/method.md: n samples, t targets, l landmarks, e values per embedding, k values per gradient.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import core_plain as plain
import numpy as np
import torch
from torch import Tensor

from service.plan import operations
from worker.influence import (
    EmbeddingOptions,
    GradientProjection,
    KernelRidge,
    OptimizerOptions,
    OptimizerState,
    Samples,
    cosine_influence,
    curvature_products,
    embed,
    gradient_scaling,
    per_sample_gradients,
    round_robin,
    sample_losses,
    weighted_gradients,
    weighted_selection,
)
from worker.influence.causal_lm import linear_layers
from worker.influence.kernel_ridge import RIDGES
from worker.influence.optimizers import layer_weights
from worker.loading.model_shape import counts_of, shape_of

MODULES = "down_proj"
PROJECTION = GradientProjection()
DIRECTIONS = 2
"""Number of directions of the curvature products."""
TARGETS = 48
"""Number of columns of influence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """`run` works on samples, or on its own data if `samples` is None; `plain` computes the same.

    dtype: of its products.  operations: None if the time is not spent in products.  rows: the tokens or rows of the pool that it
    processes.
    """

    name: str
    dtype: torch.dtype
    operations: float | None
    rows: int
    run: Callable[[Samples], Tensor | None]
    samples: Samples | None = None
    plain: Callable[[Samples], Tensor] | None = None
    has_setup: bool = False


def random_samples(count: int, shortest: int, longest: int, vocabulary: int, seed: int) -> Samples:
    """Random tokens; the second half of each sample is the response."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest, longest + 1, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return Samples(
        input_ids=generator.integers(0, vocabulary, offsets[-1]).astype(np.int32),
        response=place >= np.repeat(lengths // 2, lengths),
        offsets=offsets,
    )


def model_stages(model: Any, samples: Samples, options: argparse.Namespace) -> Iterator[Stage]:
    """The stages that run the model."""
    shape, counts = shape_of(model), counts_of(samples)
    stage = partial(Stage, dtype=model.dtype, samples=samples, rows=int(samples.lengths.sum()), has_setup=True)
    yield from _gradient_stages(model, samples, options, stage)
    yield stage(
        name="losses",
        operations=operations.forward(shape, counts),
        run=lambda part: sample_losses(model, part, token_budget=options.token_budget),
        plain=lambda part: plain.losses(model, part),
    )
    weights_n1 = torch.rand(len(samples), 1, generator=torch.Generator().manual_seed(options.seed)) + 0.5
    yield stage(
        name="weighted gradients",
        operations=operations.full_gradients(shape, counts, modules=MODULES),
        run=lambda part: _weighted(model, part, weights_n1[: len(part)], options),
        plain=lambda part: plain.weighted_gradient(model, part, weights_n1[: len(part)]),
    )
    for kind in ("jvp", "hidden", "rds", "output"):
        embedding = EmbeddingOptions(kind=kind, blocks=min(4, shape.blocks), seed=options.seed)
        yield stage(
            name=kind,
            operations=operations.embedding(shape, counts, asdict(embedding)),
            run=partial(_embed, model, embedding, options),
            plain=lambda part, embedding=embedding: plain.embeddings(model, part, embedding),
        )
    yield from _curvature_stages(model, samples.take([int(samples.lengths.argmin())]), options)


def _gradient_stages(
    model: Any, samples: Samples, options: argparse.Namespace, stage: Callable[..., Stage]
) -> Iterator[Stage]:
    """Without an optimiser (as for the targets), and scaled by an Adam state, exact and factored."""
    for name, kind in (
        ("gradients", None),
        ("gradients, Adam exact", "exact"),
        ("gradients, Adam factored", "factored"),
    ):
        if name not in options.stages:
            continue
        adam = OptimizerOptions(type="adam" if kind else "none")
        state = _random_state(model, options.seed) if kind else None
        scaling = gradient_scaling(model, MODULES, adam, state, kind or "exact")
        yield stage(
            name=name,
            operations=operations.gradients(
                shape_of(model),
                counts_of(samples),
                modules=MODULES,
                projection_dim=PROJECTION.dim,
                is_scaled_exactly=kind == "exact",
            ),
            run=partial(_gradients, model, scaling, options),
            plain=lambda part, scaling=scaling: plain.gradients(model, part, PROJECTION, scaling),
        )


def _random_state(model: Any, seed: int) -> OptimizerState:
    """Second moments spread over two decades."""
    generator = torch.Generator().manual_seed(seed)
    second = {
        weight.name: (10 ** (2 * torch.rand(weight.module.weight.shape, generator=generator) - 8)).to(model.device)
        for weight in layer_weights(model, MODULES).values()
    }
    return OptimizerState(step=10, first={}, second=second)


def _gradients(model: Any, scaling: Any, options: argparse.Namespace, part: Samples) -> Tensor:
    return per_sample_gradients(
        model, part, modules=MODULES, projection=PROJECTION, scaling=scaling, token_budget=options.token_budget
    ).values


def _embed(model: Any, embedding: EmbeddingOptions, options: argparse.Namespace, part: Samples) -> Tensor:
    return embed(model, part, options=embedding, token_budget=options.token_budget)


def _weighted(model: Any, part: Samples, weights_n1: Tensor, options: argparse.Namespace) -> Tensor:
    found = weighted_gradients(model, part, weights_n1, modules=MODULES, token_budget=options.token_budget)
    return torch.cat([sum_1OI.flatten().cpu() for sum_1OI in found.values()])


def _curvature_stages(model: Any, targets: Samples, options: argparse.Namespace) -> Iterator[Stage]:
    """What the directions share, and what each of them costs."""
    shape, counts = shape_of(model), counts_of(targets)
    kinds = [kind for kind in ("ggn", "hessian") if f"curvature, {kind}" in options.stages]
    directions = {
        name: torch.randn(DIRECTIONS, *layer.weight.shape, device=model.device)
        for name, layer in (linear_layers(model, MODULES) if kinds else {}).items()
    }
    for kind in kinds:
        shared, each = operations.curvature(shape, counts, kind=kind, modules=MODULES)

        def run(part: Samples, kind: Any = kind) -> None:
            curvature_products(model, part, directions, kind=kind, modules=MODULES, token_budget=options.token_budget)

        yield Stage(
            name=f"curvature, {kind}",
            dtype=model.dtype,
            operations=shared + DIRECTIONS * each,
            rows=int(targets.lengths.sum()),
            samples=targets,
            run=run,
        )


def data_stages(model: Any, options: argparse.Namespace) -> Iterator[Stage]:
    """The stages that need no model, on random embeddings, gradients and influence."""
    generator = torch.Generator().manual_seed(options.seed)
    landmarks, rows, e = options.kernel_landmarks, options.pool_rows, 2 * model.config.hidden_size
    gradient = operations.gradient_size(shape_of(model).measured(MODULES), PROJECTION.dim)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(options.device)

    E_le, P_lt, E_me = normal(landmarks, e), normal(landmarks, TARGETS), normal(4 * landmarks, e)
    G_lk, G_tk = normal(landmarks, gradient), normal(TARGETS, gradient)
    P_nt = normal(rows, TARGETS).cpu().numpy()
    # For each ridge: the Cholesky factor l^3 / 3, two triangular solves 2 l^2 t, for leave-one-out the inverse 2 l^3 / 3.
    fit = 2.0 * landmarks**2 * e + len(RIDGES) * (landmarks**3 + 2 * landmarks**2 * TARGETS)
    fitted = KernelRidge.fit(E_le, P_lt, ridge=RIDGES[0])
    yield Stage(
        name="influence of landmarks",
        dtype=torch.float64,
        operations=2.0 * landmarks * TARGETS * gradient,
        rows=landmarks,
        run=lambda _: cosine_influence(G_lk, G_tk),
    )
    yield Stage(
        name="kernel ridge fit",
        dtype=torch.float64,
        operations=fit,
        rows=landmarks,
        run=lambda _: KernelRidge.fit(E_le, P_lt, ridge=None).coefficients_zt,
    )
    yield Stage(
        name="propagation",
        dtype=torch.float64,
        operations=2.0 * len(E_me) * landmarks * (e + TARGETS),
        rows=len(E_me),
        run=lambda _: fitted.predict(E_me),
    )
    budget = max(rows // 20, 1)
    yield Stage(
        name="round robin",
        dtype=torch.float32,
        operations=None,
        rows=rows,
        run=lambda _: torch.from_numpy(round_robin(P_nt, budget, seed=options.seed)),
    )
    form = P_nt, np.eye(TARGETS) / (rows * TARGETS)
    yield Stage(
        name="weighted, second order",
        dtype=torch.float32,
        operations=None,
        rows=rows,
        run=lambda _: torch.from_numpy(
            weighted_selection(P_nt.mean(axis=1), budget=budget, factors=form, learning_rate=1e-3).weights
        ),
    )
