"""How many samples become landmarks."""

from collections.abc import Mapping
from typing import Any

FEWEST, MOST, POOL_SHARE = 128, 4096, 50
"""Where the job names no number: a fiftieth of the pool. Rounds make up for fewer, and few leave more for what is selected
(docs/decisions/0007-landmarks-and-embeddings.md)."""


def landmark_count(parameters: Mapping[str, Any], usable: int) -> int:
    """Of a pool with that many usable samples: what the job names, or else `POOL_SHARE` of them; no more than there are."""
    wanted = parameters["landmarks"]["count"]
    return min(usable, min(MOST, max(FEWEST, usable // POOL_SHARE)) if wanted is None else int(wanted))
