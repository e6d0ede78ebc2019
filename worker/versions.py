"""The versions that a result depends on, for its provenance."""

import platform
from importlib.metadata import version

_PACKAGES = ("winnow", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "pyarrow")


def installed() -> dict[str, str]:
    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}
