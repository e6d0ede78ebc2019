"""What a command line says of a job: `--set NAME=VALUE` and `--budget`, for `winnow submit` and `winnow select` alike."""

import json
from collections.abc import Iterable, Mapping
from typing import Any


def assigned(settings: Iterable[str], fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`fields` with the settings on top; a dot leads into an object, and a value that is JSON is read as such.

    Raises:
        ValueError: a setting is not NAME=VALUE, or leads into a value that is no object.
    """
    values = dict(fields or {})
    for text in settings:
        name, found, value = text.partition("=")
        if not found:
            raise ValueError(f"--set {text}: write NAME=VALUE, for example --set landmarks.count=256")
        into = values
        *path, last = name.split(".")
        for part in path:
            into = into.setdefault(part, {})
            if not isinstance(into, dict):
                raise ValueError(f"--set {text}: {part} is set to a value already")
        try:
            into[last] = json.loads(value)
        except json.JSONDecodeError:
            into[last] = value
    return values


def budget(text: str) -> int | float:
    """Raises ValueError where it is no number."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError as error:
        raise ValueError(f"--budget {text}: a number of samples, or a fraction between 0 and 1") from error
