"""The data of the fidelity benchmark, measured with the product's own functions and kept in the cache: exact gradients of the
pool and of the targets, every embedding, and the cost of each.

Shape suffixes: n samples of the pool, t targets, k values per gradient, e embedding size.
"""

import argparse
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import Corpus, cached, load_model, load_tokenizer, model_folder, samples_of
from rich.console import Console
from torch import Tensor

from service.plan import operations
from worker.influence import (
    EmbeddingOptions,
    GradientProjection,
    Samples,
    cosine_influence,
    embed,
    per_sample_gradients,
)
from worker.influence.causal_lm import block_list
from worker.influence.samples import IntArray
from worker.loading.model_shape import counts_of, shape_of

PIECE = 100
"""Number of rows of the pool that are measured at a time."""

console = Console(stderr=True)


def embeddings(blocks: int) -> dict[str, EmbeddingOptions]:
    """The embeddings that are compared, for a model with that many blocks."""
    depths = sorted({min(4, blocks), max(1, blocks // 2)})
    offered = {
        f"{kind} {depth} {pooling}": EmbeddingOptions(kind=kind, pooling=pooling, blocks=depth, tangents=2)
        for kind, depth in [*(("hidden", depth) for depth in depths), ("jvp", depths[0])]
        for pooling in ("last", "response")
    }
    return {**offered, "rds": EmbeddingOptions(kind="rds")}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Operations (n,) by row of the pool, and the CPU seconds that all rows took."""

    operations_n: np.ndarray[Any, np.dtype[np.float64]]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Exact influence (n, t) by target: `influence` under the projection that the exact method uses, `other` under another of the
    same size, `finer` under one of four times the size. Embeddings (n, e) by name. `cost`: by embedding, and of `gradients`;
    `target_cost`: (operations, seconds) of each target's gradients. `usable`: the rows that have a gradient."""

    ids: list[str]
    sources: list[str]
    tokens: IntArray
    influence: dict[str, Tensor]
    other: dict[str, Tensor]
    finer: dict[str, Tensor]
    embeddings: dict[str, Tensor]
    cost: dict[str, Cost]
    target_cost: dict[str, tuple[float, float]]
    usable: IntArray


def measure(options: argparse.Namespace) -> Pool:
    """Computes the missing pieces of the cache, `--processes` at a time, and reads all of it."""
    corpus, folder = Corpus(options.corpus), model_folder(options)
    rows, tokenizer = corpus.pool(options.rows, options.seed), load_tokenizer(folder)
    samples = samples_of(rows, tokenizer, options.max_length)
    targets = {name: corpus.target(name, "dev")[: options.target_rows] for name in options.targets}
    target_samples = {name: samples_of(found, tokenizer, options.max_length) for name, found in targets.items()}
    model = load_model(folder, getattr(torch, options.dtype), "cpu")
    kinds = embeddings(len(block_list(model.base_model)[1]))
    pieces = [(start, min(start + PIECE, len(samples))) for start in range(0, len(samples), PIECE)]
    names = _names(options, folder)
    tasks = [
        *((names(f"{name}.gradients"), part, "gradients") for name, part in target_samples.items()),
        *(
            (names(f"pool{a:05d}.{kind}"), samples.slice(a, b), kind)
            for a, b in pieces
            for kind in ("gradients", *kinds)
        ),
    ]
    _fill([task for task in tasks if not task[0].exists()], options, folder, kinds)
    read = {task[0]: cached(task[0], _absent) for task in tasks}

    def pool_of(kind: str) -> tuple[Tensor, float]:
        found = [read[names(f"pool{a:05d}.{kind}")] for a, _ in pieces]
        return torch.cat([tensors["values"].float() for tensors, _ in found]), sum(seconds for _, seconds in found)

    G_nk, gradient_seconds = pool_of("gradients")
    G_tk = {name: read[names(f"{name}.gradients")][0]["values"] for name in target_samples}

    def influence(seed: int | None) -> dict[str, Tensor]:
        def projected(G: Tensor) -> Tensor:
            return G if seed is None else _coarser(G, options.projection_dim, seed)

        return {name: cosine_influence(projected(G_nk), projected(G)).double() for name, G in G_tk.items()}

    gradient_operations = partial(_gradient_operations, model, options.projection_dim)
    return Pool(
        ids=[row["id"] for row in rows],
        sources=[row["source"] for row in rows],
        tokens=samples.lengths,
        influence=influence(0),
        other=influence(1),
        finer=influence(None),
        embeddings={kind: pool_of(kind)[0] for kind in kinds},
        cost={
            "gradients": Cost(operations_n=_by_row(samples, gradient_operations), seconds=gradient_seconds),
            **{
                kind: Cost(
                    operations_n=_by_row(samples, lambda part, o=each: _embedding_operations(model, o, part)),
                    seconds=pool_of(kind)[1],
                )
                for kind, each in kinds.items()
            },
        },
        target_cost={
            name: (gradient_operations(part), read[names(f"{name}.gradients")][1])
            for name, part in target_samples.items()
        },
        usable=np.flatnonzero(G_nk.norm(dim=1).numpy() > 0),
    )


def _finer(dim: int) -> GradientProjection:
    return GradientProjection(4 * dim)


def _coarser(G_nk: Tensor, dim: int, seed: int) -> Tensor:
    """Reduces gradients (n, 4 dim) of the finer projection to (n, dim) by another sum of entries with random signs, which is
    equivalent to a direct projection to `dim` values."""
    signs_k = torch.from_numpy(np.random.default_rng(seed).choice(np.float32([-1, 1]), G_nk.shape[1]))
    return (G_nk * signs_k).unflatten(1, (-1, dim)).sum(dim=1)


def _names(options: argparse.Namespace, folder: Path) -> Callable[[str], Path]:
    """A file's name contains everything that its content depends on, except for the code."""
    setup = f"{folder.name}-{options.dtype}-{options.max_length}-{options.projection_dim}-{options.seed}"
    return lambda name: Path(options.cache / "fidelity" / setup / f"{name.replace(' ', '_')}.safetensors")


def _absent() -> dict[str, Tensor]:
    raise RuntimeError("a measured piece has disappeared from the cache")


def _embedding_operations(model: Any, options: EmbeddingOptions, part: Samples) -> float:
    return operations.embedding(shape_of(model), counts_of(part), asdict(options))


def _gradient_operations(model: Any, dim: int, part: Samples) -> float:
    return operations.gradients(shape_of(model), counts_of(part), modules="down_proj", projection_dim=dim)


def _by_row(samples: Samples, count: Callable[[Samples], float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([count(samples.slice(i, i + 1)) for i in range(len(samples))])


def _fill(
    tasks: list[tuple[Path, Samples, str]],
    options: argparse.Namespace,
    folder: Path,
    kinds: Mapping[str, EmbeddingOptions],
) -> None:
    if not tasks:
        return
    start = partial(_start, folder, options, dict(kinds))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn, initializer=start) as executor:
        for number, (name, seconds) in enumerate(executor.map(_measure, *zip(*tasks, strict=True)), 1):
            console.print(f"{number}/{len(tasks)} {name}: {seconds:.1f} s", highlight=False)


def _start(folder: Path, options: argparse.Namespace, kinds: dict[str, EmbeddingOptions]) -> None:
    """Runs once in each process. One thread, so that CPU seconds measure the work alone."""
    global _model, _kinds, _projection
    torch.set_num_threads(1)
    _model, _kinds = load_model(folder, getattr(torch, options.dtype), options.device), kinds
    _projection = _finer(options.projection_dim)


def _measure(path: Path, samples: Samples, kind: str) -> tuple[str, float]:
    def make() -> dict[str, Tensor]:
        if kind == "gradients":
            return {"values": per_sample_gradients(_model, samples, projection=_projection).values}
        return {"values": embed(_model, samples, options=_kinds[kind])}

    return path.stem, cached(path, make)[1]
