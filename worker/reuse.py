"""Results that stand in the store already. Imports no torch."""

from typing import Any

from service.artifacts import ArtifactStore, named_keys
from worker.stages.keys import result_key


def known_result(store: ArtifactStore, artifact_key: str) -> dict[str, Any] | None:
    """The result beside the unit's artifact, if all that it names is there as well."""
    if not store.exists(result_key(artifact_key)):
        return None
    result: dict[str, Any] = store.read_json(result_key(artifact_key))
    return result if all(store.exists(key) for key in named_keys(result)) else None


def mark_used(store: ArtifactStore, artifact_key: str, result: dict[str, Any]) -> None:
    """The artifact, and what the result names (found in the store or made), count as used now, and are collected later."""
    for key in {artifact_key, result_key(artifact_key), *named_keys(result)}:
        store.touch(key)
