"""What the small forms of the benchmarks share."""

from collections.abc import Callable
from typing import Any

from support.tiny import EXAMPLES

REPOSITORY = EXAMPLES.parent
Run = Callable[..., dict[str, Any]]
