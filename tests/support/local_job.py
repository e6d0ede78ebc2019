"""Whole jobs in this process, on a store that tests look into; and what their results must be, by plain torch on the tokens."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from service.plan.parameters import Parameters
from service.plan.stages import Done, JobInputs, Stage
from service.settings import WorkerSettings
from support.tiny import pool_rows, target_rows, write_jsonl
from worker import local_run, summary
from worker.influence import Samples
from worker.process.main import Compute
from worker.text import token_files

SMALL: dict[str, Any] = {
    "landmarks": {"count": 12},
    "embedding": {"kind": "hidden", "blocks": 2},
    "gradient": {"projection_dim": 512},
    "max_length": 128,
    "dtype": "float32",
}
_UNUSED = {
    "exact_influence": ("landmarks", "embedding"),
    "rds_plus": ("landmarks", "embedding", "gradient"),
    "random": ("landmarks", "embedding", "gradient"),
}


def load(folder: Path) -> Any:
    """The model of a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Ran:
    """A finished job."""

    compute: Compute
    done: dict[Stage, list[Done]]

    @property
    def prepared(self) -> dict[str, Any]:
        return dict(self.done[Stage.PREPARE][-1].result)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return dict(load_file(self.path(Stage.SELECT)))

    @property
    def selected(self) -> list[int]:
        return list(self.arrays["selected"].tolist())

    @property
    def summary(self) -> dict[str, Any]:
        return summary.of_method({stage: [unit.result for unit in units] for stage, units in self.done.items()})

    def path(self, stage: Stage, shard: int = 0) -> Path:
        with self.compute.store.local(self.done[stage][shard].artifact_key) as path:
            return path

    def keys(self, stage: Stage) -> list[str]:
        return [unit.artifact_key for unit in self.done.get(stage, [])]

    def tokens(self, dataset: str) -> Samples:
        """Of `pool` or `target`."""
        return token_files.read_all(self.compute.store, self.prepared[f"{dataset}_tokens"])


def parameters(**changes: Any) -> dict[str, Any]:
    """Those of a small job, with the changes merged in; what its method has no use for is left out."""
    unused = _UNUSED.get(changes.get("method", ""), ())
    given = {name: value for name, value in SMALL.items() if name not in unused}
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(given.get(name), dict)
        given[name] = {**given[name], **value} if both else value
    if (kind := given.get("embedding", {}).get("kind")) in ("rds", "text"):
        given["embedding"] = {"kind": kind}  # which run no blocks of their own
    return Parameters(**given).model_dump(mode="json")


def run(
    model: Path,
    pool: Path,
    target: Path,
    folder: Path,
    *,
    budget: int = 6,
    resolved: dict[str, Any] | None = None,
    **changes: Any,
) -> Ran:
    """`resolved` is the model as a job names it, where that is more than a folder's name."""
    compute = Compute(artifacts=str(folder), models=model.parent, settings=WorkerSettings(device="cpu"))
    contents = [local_run._register(compute.store, file) for file in (pool, target)]
    job = JobInputs(
        model=resolved or {"kind": "registered", "name": model.name},
        pool=contents[0].fingerprint,
        target=contents[1].fingerprint,
        budget=budget,
        parameters=parameters(**changes),
    )
    return Ran(compute, local_run.LocalJob(compute, job, Progress(disable=True)).run(1))


def remembering(model: Path, pool: Path, target: Path, folder: Path, **defaults: Any) -> Callable[..., Ran]:
    """Runs jobs with other parameters on one store, so that equal work is done once; remembers those that have finished."""
    finished: dict[str, Ran] = {}

    def call(**changes: Any) -> Ran:
        name = json.dumps(changes, sort_keys=True)
        if name not in finished:
            finished[name] = run(model, pool, target, folder, **{**defaults, **changes})
        return finished[name]

    return call


def loss_of(model: Any, samples: Samples, i: int) -> torch.Tensor:
    """Mean cross-entropy of the response tokens of one sample that have a token before them."""
    part = slice(samples.offsets[i], samples.offsets[i + 1])
    ids = torch.from_numpy(samples.input_ids[part].astype(np.int64))
    counted = torch.from_numpy(samples.response[part])[1:]
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1][counted]
    return torch.nn.functional.cross_entropy(logits.float(), ids[1:][counted])


def gradients(model: Any, samples: Samples, weights: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """(n, d) float64: one sample at a time, by autograd."""
    required = [weight.requires_grad for weight in weights]
    rows = []
    for weight in weights:
        weight.requires_grad_(True)
    for i in range(len(samples)):
        found = torch.autograd.grad(loss_of(model, samples, i), list(weights))
        rows.append(torch.cat([g.flatten() for g in found]).double())
    for weight, was in zip(weights, required, strict=True):
        weight.requires_grad_(was)
    return torch.stack(rows)


def gradients_of(ran: Ran, model: Any, weights: Sequence[torch.nn.Parameter]) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of the pool and of the target."""
    return gradients(model, ran.tokens("pool"), weights), gradients(model, ran.tokens("target"), weights)


def close(found: np.ndarray, expected: torch.Tensor, share: float = 1e-4) -> None:
    """Up to that share of the largest value that is expected."""
    assert np.abs(found - expected.numpy()).max() < share * float(expected.abs().max())


def write_files(folder: Path, pool: int, target: int) -> tuple[Path, Path]:
    """A pool and a target of so many rows."""
    rows = write_jsonl(folder / "pool.jsonl", pool_rows(pool))
    return rows, write_jsonl(folder / "target.jsonl", target_rows(target, "python_function"))


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=1)


def down_projections(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith("mlp.down_proj.weight")}


def in_turns(P: np.ndarray, count: int, seed: int) -> list[int]:
    """The round robin, straight from its description."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(P.shape[1])
    taken: list[int] = []
    for turn in range(count):
        column = P[:, order[turn % len(order)]].copy()
        column[taken] = -np.inf
        taken.append(int(column.argmax()))
    return taken


def is_optimum(ran: Ran, p: np.ndarray, Q: np.ndarray, rate: float) -> None:
    """The conditions of METHOD 1 at the job's own ridge, with a p and a Q that were computed another way."""
    values, vectors = np.linalg.eigh((Q + Q.T) / 2)
    Q = vectors @ np.diag(values.clip(min=0)) @ vectors.T
    arrays, ridge = ran.arrays, ran.summary["solution"]["ridge"]
    w = arrays["weight"].astype(np.float64) * len(p) / arrays["weight"].sum()
    slope = p - rate * Q @ w - ridge * w
    chosen = w > 0
    scale = np.ptp(p) + rate * len(p) * Q.diagonal().max()
    assert np.ptp(slope[chosen]) < 2e-4 * scale
    assert slope[~chosen].max() < slope[chosen].mean() + 1e-4 * scale
    assert np.ptp((rate * Q @ w)[chosen]) > 1e-2 * np.ptp(p), "the curvature does nothing at this learning rate"


@dataclass(frozen=True)
class Truth:
    """The gradients of pool and target in full, float64."""

    model: Any
    pool: Samples
    target: Samples
    G_S: torch.Tensor
    G_T: torch.Tensor

    @property
    def cosine(self) -> torch.Tensor:
        return unit(self.G_S) @ unit(self.G_T).T
