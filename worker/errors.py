"""What can go wrong in a unit: the user's data, the user's model, the machine, or our own code."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from service.datasets.storage import fingerprint_of
from service.storage import checksums

NAMED_IN_ERROR = 10
"""Unusable rows."""


class UnitError(Exception):
    """Ends a unit's attempt. `retryable`: whether another attempt may succeed; `detail` is shown to the user."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = True

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    def as_dict(self) -> dict[str, Any]:
        return {"code": self.code, "detail": self.detail}


class DataError(UnitError):
    """The pool or the target cannot be used as it is."""

    code, retryable = "data_not_usable", False


def in_words(counts: Mapping[str, int]) -> str:
    """The most frequent first: `a: 3, b: 1`."""
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{name}: {count}" for name, count in ordered)


def max_unusable(parameters: Mapping[str, Any]) -> float:
    """The share of a dataset that the job allows to be unusable. A job of the version before has no bound."""
    return float(parameters.get("max_unusable", 1.0))


class TooManyUnusable(DataError):
    """More of the `rows` of the pool or target, `name`, cannot be used than the job allows; `unusable` are their counts by reason
    and the first of them, of all rows or, `so_far`, of those that were looked at."""

    code = "too_many_unusable"

    def __init__(
        self, name: str, rows: int, allowed: float, unusable: Mapping[str, Any], *, so_far: bool = False
    ) -> None:
        first = [f"{row['id']!r} ({row['reason']}: {row['detail']})" for row in unusable["first"][:3]]
        super().__init__(
            f"{'At least ' * so_far}{unusable['count']} of {rows} samples of the {name} cannot be used"
            f" ({in_words(unusable['by_reason'])}); max_unusable allows a share of {allowed:g}. The first are {', '.join(first)}."
            " Mend or remove them, choose a model whose chat template takes them, or raise max_unusable to select without them."
        )
        self.unusable = {name: unusable}

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "unusable": self.unusable}


def check_shards(parameters: Mapping[str, Any], shards: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """
    Args:
        shards: the dataset's name and the result of each unit that tokenised a shard of it, in order; not all of them yet.

    Raises:
        TooManyUnusable: the job cannot succeed, whatever the other shards are.
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for name, result in shards:
        by_name.setdefault(name, []).append(result)
    for name, results in by_name.items():
        by_reason: Counter[str] = sum((Counter(result["unusable"]["by_reason"]) for result in results), Counter())
        rows, allowed = results[0]["of"], max_unusable(parameters)
        if by_reason.total() > allowed * rows:
            first = [row for result in results for row in result["unusable"]["first"]][:NAMED_IN_ERROR]
            found = {"count": by_reason.total(), "by_reason": dict(by_reason), "first": first}
            raise TooManyUnusable(name, rows, allowed, found, so_far=True)


class ImportFailed(UnitError):
    """A dataset cannot be imported; `code` says why, and `errors` which of its rows cannot be used, as for an upload."""

    def __init__(
        self, code: str, detail: str, *, retryable: bool = False, errors: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        super().__init__(detail)
        self._error: dict[str, Any] = {"code": code, "detail": detail, **({"errors": list(errors)} if errors else {})}
        self.retryable = retryable  # type: ignore[misc]  # of this one, not of its class

    def as_dict(self) -> dict[str, Any]:
        return self._error


class ModelError(UnitError):
    """The model cannot be loaded or is of a kind that cannot be used."""

    code, retryable = "model_not_usable", False


class ParameterError(UnitError):
    """The job's parameters do not fit its data or model."""

    code, retryable = "parameters_not_usable", False


class OutOfMemory(UnitError):
    """Even the smallest batch did not fit."""

    code, retryable = "out_of_memory", True


class StorageFull(UnitError):
    """The artifact store has no room left."""

    code, retryable = "storage_full", True


class ArtifactUnusable(UnitError):
    """What an earlier stage made, or a dataset, is not in the store as it was written. The stage's unit makes it again."""

    problem: ClassVar[str]

    def __init__(self, key: str) -> None:
        is_dataset = fingerprint_of(key) is not None
        what, remedy = ("dataset", "Upload the dataset again and post") if is_dataset else ("artifact", "Post")
        super().__init__(f"A file of the {what} {self.problem}: {key}. {remedy} the job again.")
        self.key = key

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "artifact": self.key}


class ArtifactMissing(ArtifactUnusable):
    """Someone deleted it, the store was replaced, or another reader found it damaged."""

    code, problem = "artifact_missing", "is missing from the store"


class ArtifactDamaged(ArtifactUnusable):
    """Its bytes changed after they were written. It was set aside."""

    code, problem = "artifact_damaged", "was damaged in the store and has been set aside"


def of_the_store(error: checksums.ArtifactDamaged | FileNotFoundError) -> ArtifactUnusable:
    if isinstance(error, checksums.ArtifactDamaged):
        return ArtifactDamaged(error.key)
    # The store names the key; whatever else is missing is named without its folder, which is not for users to see.
    name = str(error.filename or error)
    return ArtifactMissing(Path(name).name if Path(name).is_absolute() else name)


class ComputeDied(UnitError):
    """The compute process was killed or crashed."""

    code, retryable = "compute_died", True


class KernelKilled(ComputeDied):
    """The compute process was killed by the kernel for lack of memory."""

    code = OutOfMemory.code


class NotHere(UnitError):
    """What the unit needs is missing on this worker alone: it is given back for another one, and that is no failed attempt."""


class ModelNotHere(NotHere):
    """The job's model is missing on this worker, or other files are in its place."""

    code = "model_not_here"


class DeviceNotHere(NotHere):
    """The device that the worker is set to is missing."""

    code = "device_not_here"


class StoreNotHere(NotHere):
    """The worker's artifact store is not the service's, or cannot be used."""

    code = "store_not_here"


NOT_HERE: Mapping[str, type[NotHere]] = {kind.code: kind for kind in (ModelNotHere, DeviceNotHere, StoreNotHere)}


class UnusableRow(Exception):
    """A row that takes no part in a job, which goes on without it.

    `reason` is a short code, by which such rows are counted; `message` says what is wrong with this one, and what would help.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Cancelled(Exception):
    """The unit was cancelled; raised by a progress report."""
