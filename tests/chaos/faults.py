"""What the started processes are told of faults, and what they told (inject/sitecustomize.py)."""

import json
import os
from collections import Counter
from pathlib import Path

INJECT = Path(__file__).parent / "inject"


class Faults:
    """One folder of a world; its processes append to the trace and read the plan at every crash point."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._armed = 0

    @property
    def environment(self) -> dict[str, str]:
        """The compute child inherits PYTHON* only."""
        return {"PYTHONPATH": str(INJECT), "PYTHON_FAULTS": str(self._folder)}

    def passed(self) -> Counter[str]:
        """How often each crash point was passed, since `forget`."""
        trace = self._folder / "trace"
        return Counter(trace.read_text().splitlines() if trace.exists() else ())

    def forget(self) -> None:
        (self._folder / "trace").unlink(missing_ok=True)

    def arm(self, point: str, passing: int = 1) -> None:
        """From now on the process that passes the point for the n-th time is killed, once."""
        self._armed += 1
        plan = {"point": point, "passing": passing, "token": f"token-{self._armed}"}
        written = self._folder / "plan.new"
        written.write_text(json.dumps(plan))
        os.replace(written, self._folder / "plan")

    def disarm(self) -> None:
        (self._folder / "plan").unlink(missing_ok=True)

    @property
    def has_struck(self) -> bool:
        return (self._folder / f"token-{self._armed}").exists()
