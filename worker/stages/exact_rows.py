"""Exact influence out of stored gradients, a shard at a time; which samples and targets count; and which targets are held out.

Suffixes are those of `worker.influence`; the last axis of exact rows, x, has t targets, r curvature directions, and Hb.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from service.datasets import storage
from service.plan.artifact_keys import result_key
from service.plan.limits import HELD_OUT_FROM
from service.storage.artifacts import ArtifactStore
from worker.duplicates.exclusions import taking_part
from worker.errors import DataError
from worker.influence import cosine_influence
from worker.stages.context import StageContext
from worker.text import token_files

Rows = npt.NDArray[np.int64]

_MAX_NONFINITE = 0.01  # of the samples of a stage; above it the model or the data is broken, not a sample
_NAMED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What the gradients of pool samples are multiplied with: those of the targets, and what the curvature stage wrote."""

    G_tk: torch.Tensor
    normalize: bool
    V_rk: torch.Tensor
    Hb_ck: torch.Tensor

    @classmethod
    def load(cls, context: StageContext, spec: Mapping[str, Any]) -> "Measure":
        G_tk = torch.cat([gradients for _, gradients in _shards(context.store, spec["target_gradients"])])
        found: dict[str, torch.Tensor] = {}
        if spec.get("curvature"):
            with context.store.local(spec["curvature"]) as path:
                found = load_file(path)
        none = G_tk.new_empty(0, G_tk.shape[1])
        normalize = context.job.parameters["gradient"]["normalize"]
        return cls(G_tk=G_tk, normalize=normalize, V_rk=found.get("V", none), Hb_ck=found.get("Hb", none))

    @property
    def columns(self) -> int:
        return len(self.G_tk) + len(self.V_rk) + len(self.Hb_ck)

    def rows(self, G_mk: torch.Tensor) -> torch.Tensor:
        """[P | G Vᵀ | G (Hb)ᵀ], float32 (m, x)."""
        P_mt = cosine_influence(G_mk, self.G_tk, normalize=self.normalize).float()
        return torch.cat([P_mt, G_mk @ self.V_rk.T, G_mk @ self.Hb_ck.T], dim=1)


def _shards(store: ArtifactStore, keys: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for key in keys:
        with store.local(key) as path:
            yield key, load_file(path)["gradients"]


def exact_shards(
    store: ArtifactStore, measure: Measure, rounds: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Rows, torch.Tensor]]:
    """(pool rows (m,), their exact columns (m, x)), shard by shard of each round; samples that are not finite are left out."""
    for round_ in rounds:
        indices, start = token_files.read_indices(store, round_["tokens"]), 0
        for key, G_mk in _shards(store, round_["gradients"]):
            own = indices[start : start + len(G_mk)]
            start += len(G_mk)
            finite = ~np.isin(own, store.read_json(result_key(key))["nonfinite"])
            yield own[finite], measure.rows(G_mk[torch.from_numpy(finite)])


def exact_rows(
    store: ArtifactStore, measure: Measure, rounds: Sequence[Mapping[str, Any]]
) -> tuple[Rows, torch.Tensor]:
    """All of `exact_shards` in rising order of the pool's rows: int64 (l,), float32 (l, x)."""
    parts = list(exact_shards(store, measure, rounds))
    if not parts:
        return np.empty(0, np.int64), torch.empty(0, measure.columns)
    indices = np.concatenate([part[0] for part in parts])
    order = np.argsort(indices, kind="stable")
    return indices[order], torch.cat([part[1] for part in parts])[torch.from_numpy(order)]


def gradient_rows(store: ArtifactStore, rounds: Sequence[Mapping[str, Any]], rows: Rows) -> torch.Tensor:
    """The stored gradients of those rows of the pool, float32 (m, k), in the order of the rounds' artifacts."""
    parts = []
    for round_ in rounds:
        indices, start = token_files.read_indices(store, round_["tokens"]), 0
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
    if len(rows) <= _MAX_NONFINITE * total:
        return
    named = [sample.id for sample in storage.read_samples(context.store, dataset, rows[:_NAMED])]
    raise DataError(
        f"{len(rows)} of {total} {what} have a non-finite loss, gradient or embedding ({', '.join(named)}"
        f"{', ...' if len(rows) > _NAMED else ''}); at most 1 % is allowed. Remove them, or use dtype float32."
    )


def valid_targets(context: StageContext, target_units: Sequence[str]) -> Rows:
    """The usable targets with a finite gradient (or embedding); the others are excluded from turns and means."""
    is_valid = token_files.read_counts(context.store, context.prepared["target_tokens"]).usable
    is_valid[nonfinite(context.store, target_units)] = False
    return np.flatnonzero(is_valid)


def split_targets(context: StageContext, valid: Rows) -> tuple[Rows, Rows]:
    """The valid targets that the second choice is made from, and those held out of it, by the seed; none of the latter of few."""
    if len(valid) < HELD_OUT_FROM:
        return valid, np.empty(0, np.int64)
    generator = np.random.default_rng([context.job.parameters["seed"], 0x4A1F])
    held_out = np.sort(generator.choice(valid, size=len(valid) // 2, replace=False))
    return np.setdiff1d(valid, held_out), held_out


def eligible_samples(context: StageContext, keys: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which samples of the pool may be selected, bool (n,): those taking part that are finite in all units of `keys`."""
    eligible = taking_part(context.store, context.prepared)
    eligible[nonfinite(context.store, keys)] = False
    return eligible


def gradient_keys(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for round_ in rounds for key in round_["gradients"]]
