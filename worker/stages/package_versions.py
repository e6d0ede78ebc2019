"""The versions that a result depends on, for its provenance."""

import hashlib
import platform
import re
from functools import cache
from importlib.metadata import distributions, version

_PACKAGES = ("winnow-select", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pyarrow")


@cache
def installed() -> dict[str, str]:
    """The packages that compute, by name; `all_packages_sha256` changes with the version of any package that is installed. Read
    once a process: a package that is installed later is not what it has imported."""
    named = {package: version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), **named, "all_packages_sha256": _all_packages_sha256()}


def _all_packages_sha256() -> str:
    """The sha256 of the lines `name==version` of all installed packages, sorted: what a lock file pins, as it really is."""
    found = (each.metadata for each in distributions())
    lines = {f"{re.sub('[-_.]+', '-', each['Name']).lower()}=={each['Version']}\n" for each in found}
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
