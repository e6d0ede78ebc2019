"""The names of artifacts: the hash of all that they depend on, including the code of their stage.

So equal work is reused, and changed code never reuses artifacts of the old.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from service.plan.stages import Stage
from service.plan.versions import code_version


def content_key(kind: str, depends_on: Mapping[str, Any], suffix: str) -> str:
    """`kind/ab/<sha256 of the canonical JSON of all it depends on><suffix>`."""
    canonical = json.dumps({"kind": kind, **depends_on}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return f"{kind}/{digest[:2]}/{digest}{suffix}"


def artifact_key(stage: Stage, kind: str, suffix: str, **depends_on: Any) -> str:
    return content_key(kind, {**depends_on, "code": code_version(stage)}, suffix)


def result_key(artifact_key: str) -> str:
    """The JSON that is written after a unit's artifact: if it exists, the unit is done."""
    return f"{artifact_key}.json"


def rendering(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """How a job's samples become text, as far as it says so: defaults are left out, as jobs of older versions do."""
    defaults: dict[str, Any] = {"reasoning": "keep", "template_arguments": {}}
    return {name: parameters[name] for name, default in defaults.items() if parameters.get(name, default) != default}


def tokens_key(
    dataset: str,
    tokenizer: str,
    max_length: int,
    salt: str | None,
    rendered: Mapping[str, Any] | None = None,
    rows: tuple[int, int] | None = None,
) -> str:
    """Of a dataset's tokens, which all other artifacts of a job depend on: jobs with different salts share none.

    `rendered`: what `rendering` says of the job. `rows`: [start, stop) of a shard of them.
    """
    salted = {} if salt is None else {"salt": salt}
    named = {"dataset": dataset, "tokenizer": tokenizer, "max_length": max_length}
    part = {} if rows is None else {"rows": list(rows)}
    return artifact_key(Stage.PREPARE, "tokens", ".parquet", **named, **salted, **(rendered or {}), **part)


def rows_key(tokens: str, indices: npt.NDArray[np.int64]) -> str:
    """Of the tokens of some rows of another artifact."""
    chosen = hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest()
    return artifact_key(Stage.PREPARE, "tokens", ".parquet", tokens=tokens, rows=chosen)
