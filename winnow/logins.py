"""The file in which `winnow login` keeps keys, each for the origin of one service. It is readable to its owner alone."""

import json
import os
import stat
import sys
import uuid
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from winnow.errors import NoAddress


class Logins(BaseModel):
    """What the file holds."""

    default: str | None = None
    """The URL that is meant where none is named: the one of the last login."""
    keys: dict[str, str] = Field(default_factory=dict, repr=False)
    """The key of each origin."""


def path() -> Path:
    """`WINNOW_LOGINS`, else `logins.json` in the user's folder of settings."""
    if named := os.environ.get("WINNOW_LOGINS"):
        return Path(named)
    if sys.platform == "win32":
        settings = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    else:
        settings = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return settings / "winnow" / "logins.json"


def read() -> Logins:
    """What is stored; nothing where there is no file.

    Raises:
        NoAddress: others may read the file, or it is damaged.
    """
    file = path()
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            if sys.platform != "win32" and mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise NoAddress(f"{file} holds keys and is open to others: chmod 600 {file}")
            return Logins.model_validate_json(opened.read())
    except (FileNotFoundError, NotADirectoryError):
        return Logins()
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged; delete it, and log in again"
        raise NoAddress(f"{file} cannot be read: {reason}") from error


def write(logins: Logins) -> Path:
    """Replaces the file at once, so that nobody reads half of it.

    Raises:
        OSError: it cannot be written.
    """
    file = path()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            json.dump(logins.model_dump(exclude_none=True), opened, indent=2)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return file
