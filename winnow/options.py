"""Options that commands share: `--set NAME=VALUE`, `--budget`, and how files are read."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a file is read; as it is given, the service checks it."""

    format: str | None = None
    columns: str | None = None
    template: str | None = None
    on_bad_row: Literal["refuse", "skip"] | None = None

    def of_target(self, format: str | None, columns: str | None, template: str | None) -> "Reading":
        """What is given for the target alone in place of what both files share."""
        given: dict[str, Any] = {"format": format, "columns": columns, "template": template}
        return replace(self, **{name: value for name, value in given.items() if value is not None})


DuplicatesOption = Literal["keep", "one"]
OverlapOption = Literal["keep", "exclude"]


def chosen(duplicates: DuplicatesOption | None, overlap: OverlapOption | None) -> dict[str, str]:
    """The parameters of a job that have an option of their own, those that are given."""
    given = {"duplicates": duplicates, "overlap": overlap}
    return {name: value for name, value in given.items() if value is not None}


def assigned(settings: Iterable[str], fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`fields` with the settings on top; a dot leads into an object, and a value that is JSON is read as JSON.

    Raises:
        ValueError: a setting is not NAME=VALUE, or its name leads into a value that is not an object.
    """
    values = dict(fields or {})
    for text in settings:
        name, found, value = text.partition("=")
        if not found:
            raise ValueError(f"--set {text}: expected NAME=VALUE, for example --set landmarks.count=256")
        into = values
        *path, last = name.split(".")
        for part in path:
            into = into.setdefault(part, {})
            if not isinstance(into, dict):
                raise ValueError(f"--set {text}: {part} already has a value")
        try:
            into[last] = json.loads(value)
        except json.JSONDecodeError:
            into[last] = value
    return values


def read_budget(text: str) -> int | float:
    """A number of samples, or a fraction of the pool.

    Raises:
        ValueError: the text is not a number.
    """
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError as error:
        raise ValueError(f"--budget {text}: expected a number of samples, or a fraction between 0 and 1") from error
