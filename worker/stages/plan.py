"""Which units a job has, and the names of their artifacts. Imports no torch: the supervisor plans, the child computes.

An artifact's name is the hash of everything it depends on, the code of its stage included; so equal work is found, not done
again, and changed code never finds the work of the old.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.artifacts import content_key
from service.jobs.ledger import UnitSpec
from service.jobs.state import Stage

# A shard is what a crash costs, and what one worker takes at a time: small, but not so many that the ledger shows.
_EMBED_SHARD_TOKENS = 32_768
_GRADIENT_SHARD_TOKENS = 8_192
_MOST_SHARDS = 256

_WORKER = Path(__file__).parent.parent
_SOURCES: dict[Stage, tuple[str, ...]] = {
    Stage.PREPARE: ("chat.py", "data.py", "stages/prepare.py"),
    Stage.EMBED: ("influence", "stages/embed.py"),
    Stage.LANDMARK_GRADIENTS: ("influence", "stages/gradients.py"),
    Stage.TARGET_GRADIENTS: ("influence", "stages/gradients.py"),
    Stage.PROPAGATE: ("influence", "stages/propagate.py"),
    Stage.SELECT: ("influence", "stages/select.py"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInputs:
    """What the stages know of a job: content and parameters, no tenant and no database id."""

    model: dict[str, Any]
    pool: str
    target: str
    budget: int
    parameters: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def code_version(stage: Stage) -> str:
    """The sha256 over the source files that a stage's artifact depends on."""
    digest = hashlib.sha256()
    for source in _SOURCES[stage]:
        path = _WORKER / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(_WORKER).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def result_key(artifact_key: str) -> str:
    """The JSON that is written after a unit's artifact: where it exists, the unit is done."""
    return f"{artifact_key}.json"


def shards(tokens: npt.NDArray[np.int64], shard_tokens: int) -> list[tuple[int, int]]:
    """Cuts samples (tokens of each, (n,)) into runs [start, stop) of about equal tokens. Depends on nothing else, so that
    every job and any number of workers meet the same shards."""
    total = int(tokens.sum())
    count = max(1, min(_MOST_SHARDS, -(-total // shard_tokens), len(tokens)))
    cuts = np.searchsorted(np.cumsum(tokens), total * np.arange(1, count) / count, side="left") + 1
    edges = [0, *np.unique(np.clip(cuts, 1, len(tokens) - 1)).tolist(), len(tokens)] if count > 1 else [0, len(tokens)]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def embed_shards(tokens: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    return shards(tokens, _EMBED_SHARD_TOKENS)


def gradient_shards(tokens: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    return shards(tokens, _GRADIENT_SHARD_TOKENS)


def tokens_key(dataset: str, tokenizer: str, max_length: int) -> str:
    depends_on = {"dataset": dataset, "tokenizer": tokenizer, "max_length": max_length}
    return content_key("tokens", {**depends_on, "code": code_version(Stage.PREPARE)}, ".parquet")


def landmarks_key(pool_tokens: str, count: int, seed: int) -> str:
    depends_on = {"pool": pool_tokens, "count": count, "seed": seed, "code": code_version(Stage.PREPARE)}
    return content_key("landmarks", depends_on, ".parquet")


def compute_units(job: JobInputs, prepared: Mapping[str, Any]) -> list[UnitSpec]:
    """The units of embed, landmark gradients and target gradients. `prepared` is the result of the prepare stage."""
    units: list[UnitSpec] = []
    for shard, (start, stop) in enumerate(prepared["embed_shards"]):
        depends_on = {
            **_model_dependence(prepared),
            "tokens": prepared["pool_tokens"],
            "embedding": job.parameters["embedding"],
            "seed": job.parameters["seed"],
            "rows": [start, stop],
            "code": code_version(Stage.EMBED),
        }
        key = content_key("embeddings", depends_on, ".safetensors")
        units.append(_rows_unit(Stage.EMBED, shard, key, prepared["pool_tokens"], start, stop))
    for stage, tokens, bounds in (
        (Stage.LANDMARK_GRADIENTS, prepared["landmarks"], prepared["landmark_shards"]),
        (Stage.TARGET_GRADIENTS, prepared["target_tokens"], prepared["target_shards"]),
    ):
        for shard, (start, stop) in enumerate(bounds):
            depends_on = {
                **_model_dependence(prepared),
                "tokens": tokens,
                "projection_dim": job.parameters["gradient"]["projection_dim"],
                "seed": job.parameters["seed"],
                "rows": [start, stop],
                "code": code_version(stage),
            }
            key = content_key("gradients", depends_on, ".safetensors")
            units.append(_rows_unit(stage, shard, key, tokens, start, stop))
    return units


def _model_dependence(prepared: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": prepared["model_fingerprint"], "dtype": prepared["dtype"]}


def _rows_unit(stage: Stage, shard: int, key: str, tokens: str, start: int, stop: int) -> UnitSpec:
    spec = {"tokens": tokens, "start": start, "stop": stop}
    return UnitSpec(stage=stage, shard=shard, artifact_key=key, spec=spec, total=stop - start)


def propagate_units(job: JobInputs, prepared: Mapping[str, Any], keys: Mapping[Stage, Sequence[str]]) -> list[UnitSpec]:
    """One unit: the kernel fit on the landmarks, and every sample's predicted influence on each target."""
    inputs = {stage.value: list(stage_keys) for stage, stage_keys in keys.items()}
    depends_on = {
        "inputs": inputs,
        "kernel": job.parameters["kernel"],
        "normalize": job.parameters["gradient"]["normalize"],
        "code": code_version(Stage.PROPAGATE),
    }
    key = content_key("influence", depends_on, ".npy")
    spec = {"inputs": inputs, "landmarks": prepared["landmarks"], "rows": prepared["n"], "targets": prepared["t"]}
    return [UnitSpec(stage=Stage.PROPAGATE, shard=0, artifact_key=key, spec=spec, total=prepared["n"])]


def select_units(job: JobInputs, prepared: Mapping[str, Any], influence_key: str) -> list[UnitSpec]:
    depends_on = {
        "influence": influence_key,
        "pool": prepared["pool_tokens"],
        "landmarks": prepared["landmarks"],
        "budget": job.budget,
        "selection": job.parameters["selection"],
        "seed": job.parameters["seed"],
        "code": code_version(Stage.SELECT),
    }
    key = content_key("selections", depends_on, ".safetensors")
    spec = {"influence": influence_key, "landmarks": prepared["landmarks"], "tokens": prepared["pool_tokens"]}
    return [UnitSpec(stage=Stage.SELECT, shard=0, artifact_key=key, spec=spec, total=prepared["n"])]


def publish_units(job_id: str, prepared: Mapping[str, Any], selection_key: str) -> list[UnitSpec]:
    spec = {"selection": selection_key}
    key = f"publish/{job_id}"
    return [UnitSpec(stage=Stage.PUBLISH, shard=0, artifact_key=key, spec=spec, total=prepared["n"])]
