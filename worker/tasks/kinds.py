"""The kinds of tasks: a new one is an entry here and a module with `run(context, input)`, which its process imports."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service.datasets import imports
from service.http.errors import ApiError
from service.storage.artifacts import ArtifactStore
from service.tasks import TaskClaim
from worker.errors import ImportFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How tasks of a kind are done.

    Attributes:
        module: whose `run(context, input)` returns the result, in a process that sees no database.
        from_hub: whether it needs the Hugging Face Hub, whatever its `input["model"]` is.
        keeps_process: whether the process, with what the module keeps, stays for the next task of the kind.
        finish: writes what else a success changes, in its transaction; a UnitError that it raises fails the attempt. Of a failure
            the task itself tells: it may be the sweep that ends it, which knows no kinds.
    """

    module: str
    from_hub: bool = False
    keeps_process: bool = False
    finish: Callable[[Session, ArtifactStore, TaskClaim, Mapping[str, Any]], None] = lambda *_: None


def _finish_import(session: Session, store: ArtifactStore, claim: TaskClaim, result: Mapping[str, Any]) -> None:
    try:
        imports.finish(session, store, claim, result)
    except ApiError as error:  # of the key's quota
        raise ImportFailed(error.problem_code, error.detail) from error
    except imports.ContentGone as error:
        raise ImportFailed("artifact_missing", str(error), retryable=True) from error


KINDS: dict[str, Kind] = {
    imports.KIND: Kind(module="worker.tasks.import_dataset", from_hub=True, finish=_finish_import),
    "preview": Kind(module="worker.tasks.preview", keeps_process=True),
}
