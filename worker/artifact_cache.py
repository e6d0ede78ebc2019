"""Results that are already in the store. Imports no torch."""

from typing import Any

from service.plan.artifact_keys import result_key
from service.storage.artifacts import ArtifactStore, named_keys
from service.storage.checksums import ArtifactDamaged


def known_result(store: ArtifactStore, artifact_key: str) -> dict[str, Any] | None:
    """The result beside the unit's artifact, if all that the unit made is there as it made it, by size and checksum.

    What the files hold is checked by whoever reads them: only then is every byte that is used one that was checked.
    """
    try:
        result: dict[str, Any] = store.read_json(result_key(artifact_key))
        return result if all(store.describe(file["key"]) == file for file in result["files"]) else None
    except (FileNotFoundError, ArtifactDamaged):
        return None


def record_result(store: ArtifactStore, artifact_key: str, result: dict[str, Any]) -> dict[str, Any]:
    """Writes the result of a unit beside its artifact, with `files`: {key, size, xxh3} of all that it made or found."""
    keys = sorted(key for key in {artifact_key, *named_keys(result)} if store.exists(key))
    result = {**result, "files": [store.describe(key) for key in keys]}
    store.write_json(result_key(artifact_key), result)
    return result


def mark_used(store: ArtifactStore, artifact_key: str, result: dict[str, Any]) -> None:
    """Marks the artifact and what its result names as used now, so that they are collected later."""
    for key in {artifact_key, result_key(artifact_key), *named_keys(result)}:
        store.touch(key)
