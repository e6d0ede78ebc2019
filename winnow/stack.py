"""The embedded stack that runs from a folder, its home. `service.local` runs it."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

DEFAULT_HOME = Path(".winnow")
LOCK, STACK = "lock", "stack.json"
"""The files of a home that a running stack holds locked, and in which it says where it answers."""


class Stack(BaseModel, frozen=True):
    """Where a running stack answers, and the key of its one tenant."""

    url: str
    api_key: str
    database_url: str
    broker_url: str
    home: Path


def running_stack(home: Path) -> Stack | None:
    """The stack that runs from this folder; None where none does, or one is still starting.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        return Stack.model_validate_json((home / STACK).read_bytes()) if is_in_use(home) else None
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def is_in_use(home: Path) -> bool:
    """Whether a stack starts, runs or stops in this folder: until its last process has ended it holds the lock.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        with (home / LOCK).open() as file:
            import fcntl  # not on Windows, where there is no stack either

            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
