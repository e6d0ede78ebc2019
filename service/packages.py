"""Whether the installed packages keep the promise that no file of a model runs code (docs/security.md)."""

import re
from importlib.metadata import PackageNotFoundError, version

# Older ones run the code of a pickle although told not to (CVE-2025-32434), and that of a kernel which a configuration names
# (CVE-2026-4372).
_OLDEST = {"torch": (2, 6), "transformers": (5, 3)}


def unsafe_packages() -> list[str]:
    """What has to be mended, each a sentence without its full stop; empty where all is well."""
    found = [problem for name, oldest in _OLDEST.items() if (problem := _too_old(name, oldest))]
    if installed := _version("kernels"):
        found.append(
            f"kernels {installed} is installed, with which a model's configuration may name code: uninstall it"
        )
    return found


def _too_old(name: str, oldest: tuple[int, int]) -> str | None:
    installed = _version(name)
    numbers = re.match(r"(\d+)\.(\d+)", installed or "")
    if numbers is None or tuple(map(int, numbers.groups())) >= oldest:
        return None
    first = ".".join(map(str, oldest))
    return f"{name} {installed} is older than {first}, the first that is safe with models of others: upgrade it"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
