"""Whether the installed packages keep the promise that no file of a model runs code (docs/security.md)."""

import re
from importlib.metadata import PackageNotFoundError, version

# Older versions run code in a pickle despite weights_only (CVE-2025-32434), or a kernel that a configuration names
# (CVE-2026-4372).
_OLDEST = {"torch": (2, 6), "transformers": (5, 3)}


def unsafe_packages() -> list[str]:
    """What has to be mended, each a sentence without its full stop; empty where all is well."""
    found = []
    for name, oldest in _OLDEST.items():
        installed = _version(name)
        numbers = re.match(r"(\d+)\.(\d+)", installed or "")
        if numbers is not None and tuple(map(int, numbers.groups())) < oldest:
            first = ".".join(map(str, oldest))
            problem = f"older than {first}, the first version that is safe with untrusted models: upgrade it"
            found.append(f"{name} {installed} is {problem}")
    if installed := _version("kernels"):
        found.append(f"kernels {installed} is installed, which lets a model's configuration load code: uninstall it")
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
