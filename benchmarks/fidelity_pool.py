"""The data of the fidelity benchmarks, measured with the product's own functions and kept in the cache: exact gradients of the
pool and of the targets, and embeddings by passes through the model.

Shape suffixes: n samples of the pool, t samples of a target, k values per gradient, e embedding size.
"""

import argparse
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from corpus import Corpus, cached, common_arguments, load_model, load_tokenizer, model_folder, samples_of
from rich.console import Console
from torch import Tensor

from service.plan.operations import Shape
from worker.influence import (
    EmbeddingOptions,
    GradientProjection,
    Samples,
    cosine_influence,
    embed,
    per_sample_gradients,
)
from worker.influence.samples import IntArray
from worker.loading.model_shape import shape_of

PIECE = 100
"""Number of rows of the pool that are measured at a time."""
GRADIENTS = "gradients"

console = Console(stderr=True)
Kinds = Mapping[str, EmbeddingOptions]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """A pool and its targets as one model sees them.

    influence: exact cosines (n, t) by target, under the projection that the exact method uses; `other` under other random signs.
    embeddings: (n, e) by name; target_embeddings: (t, e) by target and name.  usable: the rows that have a gradient.
    shape: the model's sizes.  token_rows: its input embeddings, (V, D).
    """

    ids: list[str]
    samples: Samples
    targets: dict[str, Samples]
    influence: dict[str, Tensor]
    other: dict[str, Tensor]
    embeddings: dict[str, Tensor]
    target_embeddings: dict[str, dict[str, Tensor]]
    usable: IntArray
    shape: Shape
    token_rows: Tensor


@dataclass(frozen=True, kw_only=True)
class Task:
    """One file of the cache: gradients or an embedding of some samples."""

    path: Path
    samples: Samples
    kind: str


def arguments(doc: str | None, targets: Sequence[str], rows: int = 2000) -> argparse.ArgumentParser:
    """The options that the fidelity benchmarks share."""
    parser = common_arguments(doc, rows=rows, targets=list(targets))
    parser.add_argument("--target-rows", type=int, default=48)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--projection-dim", type=int, default=16_384)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--draws", type=int, default=4, help="number of draws of landmarks, each with its own seed")
    return parser


def measure(options: argparse.Namespace, kinds: Kinds, of_targets: Sequence[str] = ()) -> Pool:
    """Computes the missing pieces of the cache, `--processes` at a time, and reads all of it.

    kinds: the embeddings of the pool that are wanted; `of_targets`: those of them that the targets have too.
    """
    corpus, folder = Corpus(options.corpus), model_folder(options)
    rows, tokenizer = corpus.pool(options.rows, options.seed), load_tokenizer(folder)
    samples = samples_of(rows, tokenizer, options.max_length)
    targets = {name: corpus.target(name, "dev")[: options.target_rows] for name in options.targets}
    target_samples = {name: samples_of(found, tokenizer, options.max_length) for name, found in targets.items()}
    model = load_model(folder, getattr(torch, options.dtype), "cpu")

    path = _paths(options, folder)
    pieces = [(start, min(start + PIECE, len(samples))) for start in range(0, len(samples), PIECE)]

    def of_pool(kind: str) -> list[Task]:
        return [Task(path=path(f"pool{a:05d}", kind), samples=samples.slice(a, b), kind=kind) for a, b in pieces]

    def of_target(name: str, kind: str) -> Task:
        return Task(path=path(f"{name}{options.target_rows}", kind), samples=target_samples[name], kind=kind)

    tasks = [of_target(name, kind) for name in target_samples for kind in (GRADIENTS, *of_targets)]
    tasks += [task for kind in (GRADIENTS, *kinds) for task in of_pool(kind)]
    _fill([task for task in tasks if not task.path.exists()], options, folder, kinds)

    def read(*wanted: Task) -> Tensor:
        return torch.cat([cached(task.path, _absent)[0]["values"].float() for task in wanted])

    G_nk = read(*of_pool(GRADIENTS))
    G_tk = {name: read(of_target(name, GRADIENTS)) for name in target_samples}

    def influence(seed: int) -> dict[str, Tensor]:
        coarse_nk = _coarser(G_nk, options.projection_dim, seed)
        return {
            name: cosine_influence(coarse_nk, _coarser(G, options.projection_dim, seed)).double()
            for name, G in G_tk.items()
        }

    return Pool(
        ids=[row["id"] for row in rows],
        samples=samples,
        targets=target_samples,
        influence=influence(0),
        other=influence(1),
        embeddings={kind: read(*of_pool(kind)) for kind in kinds},
        target_embeddings={name: {kind: read(of_target(name, kind)) for kind in of_targets} for name in target_samples},
        usable=np.flatnonzero(G_nk.norm(dim=1).numpy() > 0),
        shape=shape_of(model),
        token_rows=model.get_input_embeddings().weight.detach(),
    )


def _finer(dim: int) -> GradientProjection:
    return GradientProjection(4 * dim)


def _coarser(G_nk: Tensor, dim: int, seed: int) -> Tensor:
    """Reduces gradients (n, 4 dim) of the finer projection to (n, dim) by another sum of entries with random signs, which is
    equivalent to a direct projection to `dim` values: one measurement gives the influence under any number of signs."""
    if G_nk.shape[1] <= dim:
        return G_nk
    signs_k = torch.from_numpy(np.random.default_rng(seed).choice(np.float32([-1, 1]), G_nk.shape[1]))
    return (G_nk * signs_k).unflatten(1, (-1, dim)).sum(dim=1)


def _paths(options: argparse.Namespace, folder: Path) -> Callable[[str, str], Path]:
    """A file's name contains everything that its content depends on, except for the code."""
    setup = f"{folder.name}-{options.dtype}-{options.max_length}-{options.projection_dim}-{options.seed}"
    return lambda part, kind: Path(options.cache / "fidelity" / setup / f"{part}.{kind.replace(' ', '_')}.safetensors")


def _absent() -> dict[str, Tensor]:
    raise RuntimeError("a measured piece has disappeared from the cache")


def _fill(tasks: list[Task], options: argparse.Namespace, folder: Path, kinds: Kinds) -> None:
    if not tasks:
        return
    start = partial(_start, folder, options, dict(kinds))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn, initializer=start) as executor:
        for number, (name, seconds) in enumerate(executor.map(_measure, tasks), 1):
            console.print(f"{number}/{len(tasks)} {name}: {seconds:.1f} s", highlight=False)


def _start(folder: Path, options: argparse.Namespace, kinds: dict[str, EmbeddingOptions]) -> None:
    """Runs once in each process, with one thread: more only wait for the other processes'."""
    global _model, _kinds, _projection
    torch.set_num_threads(1)
    _model, _kinds = load_model(folder, getattr(torch, options.dtype), options.device), kinds
    _projection = _finer(options.projection_dim)


def _measure(task: Task) -> tuple[str, float]:
    def make() -> dict[str, Tensor]:
        if task.kind == GRADIENTS:
            return {"values": per_sample_gradients(_model, task.samples, projection=_projection).values}
        return {"values": embed(_model, task.samples, options=_kinds[task.kind])}

    return task.path.stem, cached(task.path, make)[1]
