"""Libraries that only some calls need."""

from importlib.util import find_spec

from winnow.version import DISTRIBUTION


def require(library: str, extra: str, purpose: str) -> None:
    """That an optional library is installed.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if find_spec(library) is None:
        raise ModuleNotFoundError(f"{purpose} needs {library}: pip install '{DISTRIBUTION}[{extra}]'", name=library)
