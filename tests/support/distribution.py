"""What pyproject.toml says of the distribution, and what an installation of it brings."""

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required(extras: Iterable[str]) -> set[str]:
    """The distributions that an installation with these extras brings, as the metadata of the installed ones has it."""
    own = PROJECT["optional-dependencies"]
    pending = [(text, "") for text in (*PROJECT["dependencies"], *(text for extra in extras for text in own[extra]))]
    seen: set[tuple[str, str]] = set()
    found: set[str] = set()
    while pending:
        entry = text, extra = pending.pop()
        requirement = Requirement(text)
        if entry in seen or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        seen.add(entry)
        if requirement.name == PROJECT["name"]:
            pending += [(text, "") for each in requirement.extras for text in own[each]]
            continue
        found.add(canonicalize_name(requirement.name))
        try:
            needs = requires(requirement.name) or []
        except PackageNotFoundError:  # an extra that is not installed here
            continue
        pending += [(text, each) for each in ("", *requirement.extras) for text in needs]
    return found
