"""The kinds of tasks: a new one is an entry here and a module with `run(context, input)`, which its process imports."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service.tasks import TaskClaim


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How tasks of a kind are done.

    Attributes:
        module: whose `run(context, input)` returns the result, in a process that sees no database.
        from_hub: whether it needs the Hugging Face Hub, whatever its `input["model"]` is.
        keeps_process: whether the process, with what the module keeps, stays for the next task of the kind.
        finish: writes what else a success changes, in its transaction. Of a failure the task itself tells: it may be the sweep
            that ends it, which knows no kinds.
    """

    module: str
    from_hub: bool = False
    keeps_process: bool = False
    finish: Callable[[Session, TaskClaim, Mapping[str, Any]], None] = lambda _session, _claim, _result: None


KINDS: dict[str, Kind] = {
    "preview": Kind(module="worker.tasks.preview", keeps_process=True),
}
