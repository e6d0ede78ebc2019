"""The names of artifacts: the hash of all that they depend on, the code of their stage included.

So equal work is found, not done again, and changed code never finds the work of the old. Imports no torch.
"""

import hashlib
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.artifacts import content_key
from service.jobs.state import Stage

# A shard is what a crash costs, and what one worker takes at a time: small, but not so many that the ledger shows.
_EMBED_SHARD_TOKENS = 32_768
_GRADIENT_SHARD_TOKENS = 8_192
_MOST_SHARDS = 256

_WORKER = Path(__file__).parent.parent
_LOADED = ("influence", "adapters.py", "models.py", "placement.py")  # what a loaded model computes
_EXACT = ("influence", "stages/influence.py")
# What reads tokens is in their names already, by PREPARE.
_SOURCES: dict[Stage, tuple[str, ...]] = {
    Stage.PREPARE: ("chat.py", "data.py", "influence/landmarks.py", "stages/prepare.py"),
    Stage.WARMUP: (*_LOADED, "warmup.py", "stages/optimizer.py", "stages/warmup.py"),
    Stage.LANDMARK_GRADIENTS: (*_LOADED, "stages/influence.py", "stages/optimizer.py", "stages/gradients.py"),
    Stage.CHOOSE_EMBEDDING: (*_EXACT, "stages/propagate.py", "stages/choose.py"),
    Stage.CURVATURE: (*_LOADED, "stages/influence.py", "stages/optimizer.py", "stages/curvature.py"),
    Stage.EMBED: (*_LOADED, "stages/influence.py", "stages/embed.py"),
    Stage.PROPAGATE: (*_EXACT, "stages/propagate.py"),
    Stage.SELECT: (*_EXACT, "stages/propagate.py", "stages/select.py"),
    Stage.VALIDATE: (*_LOADED, "stages/optimizer.py", "stages/validate.py"),
}
_SAME_CODE = {
    Stage.TARGET_GRADIENTS: Stage.LANDMARK_GRADIENTS,
    Stage.REFINE: Stage.LANDMARK_GRADIENTS,
    Stage.CANDIDATES: Stage.EMBED,
    Stage.EMBED_TARGET: Stage.EMBED,
}
COMPUTED: tuple[Stage, ...] = tuple(stage for stage in Stage if stage != Stage.PUBLISH)
"""The stages whose results are content-addressed."""


@cache
def code_version(stage: Stage) -> str:
    """The sha256 over the source files that a stage's artifact depends on."""
    digest = hashlib.sha256()
    for source in _SOURCES[_SAME_CODE.get(stage, stage)]:
        path = _WORKER / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(_WORKER).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@cache
def worker_version() -> str:
    """12 digits of a sha256 over all code whose results are kept: workers that differ in it make different artifacts."""
    return hashlib.sha256("".join(code_version(stage) for stage in COMPUTED).encode()).hexdigest()[:12]


def artifact_key(stage: Stage, kind: str, suffix: str, **depends_on: Any) -> str:
    return content_key(kind, {**depends_on, "code": code_version(stage)}, suffix)


def result_key(artifact_key: str) -> str:
    """The JSON that is written after a unit's artifact: where it exists, the unit is done."""
    return f"{artifact_key}.json"


def tokens_key(dataset: str, tokenizer: str, max_length: int, salt: str | None) -> str:
    """Of a dataset's tokens, on whose names those of all other artifacts of a job depend: with a salt it shares none."""
    salted = {} if salt is None else {"salt": salt}
    named = {"dataset": dataset, "tokenizer": tokenizer, "max_length": max_length}
    return artifact_key(Stage.PREPARE, "tokens", ".parquet", **named, **salted)


def rows_key(tokens: str, indices: npt.NDArray[np.int64]) -> str:
    """Of the tokens of some rows of another artifact."""
    chosen = hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest()
    return artifact_key(Stage.PREPARE, "tokens", ".parquet", tokens=tokens, rows=chosen)


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
