"""Exact influence out of stored gradients, a shard at a time; and which samples had none that is finite.

Shape suffixes: m samples of a shard, k values a gradient, t targets, r curvature directions, c = t + r + 1 columns (t without
curvature directions).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from service.artifacts import ArtifactStore
from service.datasets import storage
from worker import data
from worker.errors import DataError
from worker.influence import cosine_influence
from worker.stages.context import StageContext
from worker.stages.keys import result_key

_MOST_NONFINITE = 0.01  # of the samples of a stage; above it the model or the data is broken, not a sample
_NAMED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What the gradients of pool samples are multiplied with: those of the targets, and the curvature's directions."""

    G_T: torch.Tensor
    normalize: bool
    V_rk: torch.Tensor | None
    Hb_k: torch.Tensor | None

    @classmethod
    def load(cls, context: StageContext, spec: Mapping[str, Any]) -> "Measure":
        V_rk = Hb_k = None
        if spec.get("curvature"):
            with context.store.local(spec["curvature"]) as path:
                found = load_file(path)
            V_rk, Hb_k = found.get("directions"), found.get("Hb")
        return cls(
            G_T=torch.cat([gradients for _, gradients in _shards(context.store, spec["target_gradients"])]),
            normalize=context.job.parameters["gradient"]["normalize"],
            V_rk=V_rk,
            Hb_k=Hb_k,
        )

    @property
    def columns(self) -> int:
        return len(self.G_T) + (0 if self.V_rk is None else len(self.V_rk) + 1)

    def rows(self, G_mk: torch.Tensor) -> torch.Tensor:
        """[P | G V^T | G Hb], float32 (m, c); the last is 0 where the optimiser has no drift."""
        P_mt = cosine_influence(G_mk, self.G_T, normalize=self.normalize).float()
        if self.V_rk is None:
            return P_mt
        drift_m = torch.zeros(len(G_mk)) if self.Hb_k is None else G_mk @ self.Hb_k
        return torch.cat([P_mt, G_mk @ self.V_rk.T, drift_m[:, None]], dim=1)


def _shards(store: ArtifactStore, keys: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for key in keys:
        with store.local(key) as path:
            yield key, load_file(path)["gradients"]


def exact_shards(
    store: ArtifactStore, measure: Measure, rounds: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[npt.NDArray[np.int64], torch.Tensor]]:
    """(pool rows (m,), their exact columns (m, c)), shard by shard of each round; samples that are not finite are left out."""
    for round_ in rounds:
        indices, start = data.read_indices(store, round_["tokens"]), 0
        for key, G_mk in _shards(store, round_["gradients"]):
            own = indices[start : start + len(G_mk)]
            start += len(G_mk)
            finite = ~np.isin(own, store.read_json(result_key(key))["nonfinite"])
            yield own[finite], measure.rows(G_mk[torch.from_numpy(finite)])


def exact_rows(
    store: ArtifactStore, measure: Measure, rounds: Sequence[Mapping[str, Any]]
) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
    """All of `exact_shards` in rising order of the pool's rows: int64 (l,), float32 (l, c)."""
    parts = list(exact_shards(store, measure, rounds))
    if not parts:
        return np.empty(0, np.int64), torch.empty(0, measure.columns)
    indices = np.concatenate([part[0] for part in parts])
    order = np.argsort(indices, kind="stable")
    return indices[order], torch.cat([part[1] for part in parts])[torch.from_numpy(order)]


def gradient_rows(
    store: ArtifactStore, rounds: Sequence[Mapping[str, Any]], rows: npt.NDArray[np.int64]
) -> torch.Tensor:
    """The stored gradients of those rows of the pool, float32 (m, k), in the order of the rounds' artifacts."""
    parts = []
    for round_ in rounds:
        indices, start = data.read_indices(store, round_["tokens"]), 0
        for _, G_mk in _shards(store, round_["gradients"]):
            wanted = np.isin(indices[start : start + len(G_mk)], rows)
            parts.append(G_mk[torch.from_numpy(wanted)])
            start += len(G_mk)
    return torch.cat(parts)


def nonfinite(store: ArtifactStore, keys: Sequence[str]) -> list[int]:
    """The rows of the dataset that the units of these artifacts found not finite, rising."""
    return sorted({row for key in keys for row in store.read_json(result_key(key))["nonfinite"]})


def check_nonfinite(context: StageContext, dataset: str, rows: Sequence[int], total: int, what: str) -> None:
    """Some samples may have no finite gradient and are left out; too many are an error.

    Raises:
        DataError: more than 1 % of `total`; names the first ten by their ids.
    """
    if len(rows) <= _MOST_NONFINITE * total:
        return
    named = [sample.id for sample in storage.read_samples(context.store, dataset, rows[:_NAMED])]
    raise DataError(
        f"{len(rows)} of {total} {what} have a loss, gradient or embedding that is not finite ({', '.join(named)}"
        f"{', ...' if len(rows) > _NAMED else ''}); at most 1 % may. Remove them, or compute with dtype float32."
    )


def speaking_targets(context: StageContext, target_gradients: Sequence[str]) -> npt.NDArray[np.int64]:
    """The targets that have a response and a finite gradient; the others take no turn and no part in the mean."""
    speaks = data.read_counts(context.store, context.prepared["target_tokens"]).predicted > 0
    speaks[nonfinite(context.store, target_gradients)] = False
    return np.flatnonzero(speaks)


def eligible_samples(context: StageContext, keys: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which samples of the pool may be selected, bool (n,): with a response, and finite in all units of `keys`."""
    eligible = data.read_counts(context.store, context.prepared["pool_tokens"]).predicted > 0
    eligible[nonfinite(context.store, keys)] = False
    return eligible


def gradient_keys(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for round_ in rounds for key in round_["gradients"]]
