"""What the processes of tasks run in tests: each way in which a task may end."""

import os
import signal
import time
from typing import Any

from worker.errors import DataError
from worker.tasks.process import TaskContext

_calls = 0


def run(context: TaskContext, input: dict[str, Any]) -> dict[str, Any]:
    """Does what `input["do"]` says."""
    global _calls
    _calls += 1
    match input["do"]:
        case "answer":
            context.store.write_json(f"tmp/{input['name']}", input)
        case "report":
            deadline = time.monotonic() + 600
            while time.monotonic() < deadline:
                context.report({"rows": 3, "pid": os.getpid()})
                time.sleep(0.05)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "refuse":
            raise DataError("These rows cannot be used.")
        case "break":
            raise ZeroDivisionError("a bug")
    return {"calls": _calls, "pid": os.getpid(), "environment": sorted(os.environ)}
