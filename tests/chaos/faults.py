"""What the started processes are told of faults, and what they told (inject/sitecustomize.py)."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

    def arm(self, point: str, passing: int = 1, *, action: str = "kill") -> None:
        """From now on the process that passes the point for the n-th time is killed, once; or it does another `action`: `stop`
        (SIGSTOP), or `hold`, which stands still until `release`."""
        self._plan("plan", point=point, passing=passing, action=action)

    def tear(self, kind: str, suffix: str) -> None:
        """From now on who writes an artifact of the kind leaves half of it, as if it were killed meanwhile, once."""
        self._plan("tear", kind=kind, suffix=suffix)

    def weigh_batches(self, bytes_per_token: int = 0, *, touch: bool = False, poison: Sequence[int] = ()) -> None:
        """From now on batches take so much memory, for which `touch` asks really, and the compute child aborts of the poison."""
        self._plan("batches", bytes_per_token=bytes_per_token, touch=touch, poison=list(poison))

    def batch_sizes(self) -> list[int]:
        """Padded tokens of each batch since `weigh_batches`."""
        sizes = self._folder / "sizes"
        return [int(size) for size in sizes.read_text().split()] if sizes.exists() else []

    def _plan(self, name: str, **plan: Any) -> None:
        self._armed += 1
        written = self._folder / f"{name}.new"
        written.write_text(json.dumps({**plan, "token": f"token-{self._armed}"}))
        os.replace(written, self._folder / name)

    def release(self, *, but_latest: bool = False) -> None:
        """Whoever stands still goes on; or all but the process that the latest plan has struck."""
        for number in range(1, self._armed + (not but_latest)):
            (self._folder / f"token-{number}.go").touch()

    def disarm(self) -> None:
        for name in ("plan", "tear", "batches", "sizes"):
            (self._folder / name).unlink(missing_ok=True)

    @property
    def has_struck(self) -> bool:
        return self.struck is not None

    @property
    def struck(self) -> int | None:
        """The process that the latest plan has struck."""
        token = self._folder / f"token-{self._armed}"
        return int(token.read_text()) if token.exists() and token.stat().st_size else None
