"""The size of a job, as its costs are counted from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.plan.operations import TokenCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCounts:
    """The size of a job. `estimated`: token counts are estimated from bytes. Of the pool, `usable` samples take part, and
    `left_out` could, were it not for an option."""

    pool: TokenCounts
    target: TokenCounts
    budget: int
    estimated: bool
    usable: int | None = None
    left_out: int = 0
    candidates: Sequence[Mapping[str, Any]] | None = None
    dtype: str | None = None

    @property
    def selectable(self) -> float:
        """Samples of the pool that take part; before that is known, all of them."""
        return self.pool.samples if self.usable is None else self.usable

    def drawn(self, samples: float) -> TokenCounts:
        """Of so many average usable samples of the pool; those that cannot be used have no tokens."""
        return replace(self.pool, samples=self.selectable + self.left_out).scaled(samples)

    @classmethod
    def of_prepared(cls, prepared: Mapping[str, Any], budget: int) -> "JobCounts":
        """Counted: from the result of the prepare stage."""
        return cls(
            pool=TokenCounts.of_summary(prepared["pool_counts"]),
            target=TokenCounts.of_summary(prepared["target_counts"]),
            budget=budget,
            estimated=False,
            usable=prepared.get("usable"),
            left_out=(prepared.get("exclusions") or {"count": 0})["count"],
            candidates=prepared.get("candidates"),
            dtype=prepared["dtype"],
        )
