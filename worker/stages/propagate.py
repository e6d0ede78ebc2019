"""Propagate: exact influence of the landmarks, kernel ridge regression from embeddings, every sample's influence."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from service.artifacts import ArtifactStore
from service.jobs.state import Stage
from worker import data
from worker.influence import KernelRidge, cosine_influence, fidelity
from worker.stages.context import StageContext

_ROWS = 4_096  # samples predicted at a time: bounds the kernel block to _ROWS x landmarks


def run(context: StageContext, artifact_key: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Writes P, float32 (n, t), as .npy: the exact influence in the rows of landmarks, the propagated one elsewhere."""
    store, kernel, inputs = context.store, context.job.parameters["kernel"], spec["inputs"]
    landmarks = data.read_indices(store, spec["landmarks"])
    P_lt = cosine_influence(
        _gradients(store, inputs[Stage.LANDMARK_GRADIENTS]),
        _gradients(store, inputs[Stage.TARGET_GRADIENTS]),
        normalize=context.job.parameters["gradient"]["normalize"],
    )
    ridge = KernelRidge.fit(
        _landmark_embeddings(store, inputs[Stage.EMBED], landmarks),
        P_lt,
        kernel=kernel["kind"],
        ridge=kernel["ridge"],
        bandwidth=kernel["bandwidth"],
    )
    with store.writing(artifact_key) as path:
        shape = (spec["rows"], spec["targets"])
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for start, P_mt in _predictions(store, inputs[Stage.EMBED], ridge):
                inside = (landmarks >= start) & (landmarks < start + len(P_mt))
                P_mt[landmarks[inside] - start] = P_lt[torch.from_numpy(inside)].to(P_mt.dtype)
                file.write(P_mt.to(torch.float32).numpy().tobytes())
                context.report(start + len(P_mt))
    found = fidelity(P_lt, ridge.leave_one_out())
    return {
        "fidelity": {
            "mean_r2": found.mean_r2,
            "mean_spearman": found.mean_spearman,
            "r2": list(found.r2),
            "spearman": list(found.spearman),
        },
        "sigma": ridge.sigma,
        "delta": ridge.delta,
    }


def _gradients(store: ArtifactStore, keys: Sequence[str]) -> torch.Tensor:
    parts = []
    for key in keys:
        with store.local(key) as path:
            parts.append(load_file(path)["gradients"])
    return torch.cat(parts)


def _landmark_embeddings(store: ArtifactStore, keys: Sequence[str], landmarks: np.ndarray) -> torch.Tensor:
    """The landmarks' rows, float32 (l, e), gathered shard by shard."""
    parts, start = [], 0
    for E_me in _embedding_shards(store, keys):
        inside = landmarks[(landmarks >= start) & (landmarks < start + len(E_me))] - start
        parts.append(E_me[torch.from_numpy(inside)].float())
        start += len(E_me)
    return torch.cat(parts)


def _embedding_shards(store: ArtifactStore, keys: Sequence[str]) -> Iterator[torch.Tensor]:
    for key in keys:
        with store.local(key) as path, safe_open(path, framework="pt") as file:
            yield file.get_tensor("embeddings")


def _predictions(store: ArtifactStore, keys: Sequence[str], ridge: KernelRidge) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, P (m, t)) in order."""
    start = 0
    for shard in _embedding_shards(store, keys):
        for E_me in shard.split(_ROWS):
            yield start, ridge.predict(E_me.float())
            start += len(E_me)
