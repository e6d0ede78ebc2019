"""What can go wrong in a unit, told apart: the user's data, the user's model, the machine, and our own code."""

from typing import Any, ClassVar, Self


class UnitError(Exception):
    """Ends a unit's attempt. `retryable` says whether trying again could help; `detail` is shown to the user."""

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


class ArtifactMissing(UnitError):
    """What an earlier stage has written is gone: someone deleted it, or the store was exchanged."""

    code, retryable = "artifact_missing", False

    @classmethod
    def named(cls, error: FileNotFoundError) -> Self:
        return cls(f"A file is gone from the artifact store: {error.filename or error}. Post the job again.")


class ComputeDied(UnitError):
    """The compute child was killed or crashed."""

    code, retryable = "compute_died", True


class KernelKilled(ComputeDied):
    """The compute child was killed by the kernel, for want of memory."""

    code = OutOfMemory.code


class Cancelled(Exception):
    """The unit was told to stop; raised out of a progress report."""
