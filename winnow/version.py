"""Which version this is."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "winnow-select"


@cache
def client_version() -> str:
    """Of the distribution; `unknown` where its metadata are missing, as in a bare copy of the sources."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


def user_agent() -> str:
    return f"{DISTRIBUTION}/{client_version()}"
