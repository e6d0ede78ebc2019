"""The process that does tasks, requested and answered as the compute process is (`worker/process/main.py`); it has no device.

<- {"type": "start", "artifacts": url, "models": folder, "worker": {...}, "log": {...}}
<- {"type": "run", "module": ..., "input": {...}, "log": {...}}
-> {"type": "alive"}, {"type": "progress", "done": {...}}
-> {"type": "done", "result": ...} | {"type": "failed", "error": ..., "retryable": ...}
"""

import importlib
import logging
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.observability import logs
from service.settings import LogSettings, WorkerSettings
from service.storage.artifacts import ArtifactStore
from service.storage.checksums import ArtifactDamaged
from worker.errors import OutOfMemory, UnitError, of_the_store
from worker.process.conversation import Conversation
from worker.process.memory import hold_to, usual_limit

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TaskContext:
    """What a task is given. `report` takes its progress, an object of JSON, of which a few a second are sent on."""

    store: ArtifactStore
    models: Path
    settings: WorkerSettings
    report: Callable[[Mapping[str, Any]], None]


def _answer(context: TaskContext, task: Mapping[str, Any], conversation: Conversation) -> None:
    try:
        result = importlib.import_module(task["module"]).run(context, task["input"])
        conversation.send(type="done", result=result)
    except UnitError as error:
        conversation.send(type="failed", error=error.as_dict(), retryable=error.retryable)
    except (FileNotFoundError, ArtifactDamaged) as error:
        conversation.send(type="failed", error=of_the_store(error).as_dict(), retryable=True)
    except MemoryError as error:
        conversation.send(
            type="failed", error=OutOfMemory(str(error) or "The memory is used up.").as_dict(), retryable=True
        )
    except Exception as error:
        log.exception("the task failed")
        where = traceback.extract_tb(error.__traceback__)[-1]
        detail = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        conversation.send(type="failed", error={"code": "internal_error", "detail": detail}, retryable=True)


def main() -> None:
    conversation = Conversation.of_this_process()
    start = conversation.messages.get()
    logs.configure(LogSettings(**start["log"]), service="task")
    settings = WorkerSettings(**start["worker"])
    hold_to(settings.memory_bytes or usual_limit())
    store = ArtifactStore(start["artifacts"])
    context = TaskContext(store, Path(start["models"]), settings, conversation.report)
    while True:
        task = conversation.messages.get()
        with logs.bound(**task["log"]):
            _answer(context, task, conversation)


if __name__ == "__main__":
    main()
