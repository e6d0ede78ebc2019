"""What a setting of the fidelity benchmark costs: how many times dearer RDS+ is, by operations.

By the formula, at the size that the paper's table is about: 7B parameters in 32 blocks, a pool of 200,000 samples of equal length
and a budget of 10,000. A forward pass counts 2 and a gradient 4 (METHOD 3), with neither targets nor projection. And as measured:
the operations of this very run, at the model's own shape, with the output head, the projection and the targets.
"""

from dataclasses import asdict

import numpy as np
from fidelity_pool import Pool

from service.plan import operations
from service.plan.job_counts import JobCounts
from service.plan.operations import TokenCounts
from service.plan.parameters import Parameters
from service.plan.refine_cap import refine_cap
from worker.influence import EmbeddingOptions
from worker.influence.samples import IntArray
from worker.loading.model_shape import counts_of

POOL, BUDGET, BLOCKS = 200_000, 10_000, 32
FORWARD, GRADIENT = 2.0, 4.0
RDS = EmbeddingOptions(kind="rds")


def passes(embedding: EmbeddingOptions | None, blocks: int = BLOCKS) -> float:
    """Forward passes through all blocks that an embedding takes: none for one that is made of tokens."""
    if embedding is None:
        return 0.0
    if embedding.kind in ("rds", "output"):
        return 1.0
    return min(embedding.blocks / blocks, 1.0) * (1 + 2 * embedding.tangents if embedding.kind == "jvp" else 1)


def by_formula(embedding: EmbeddingOptions | None, *, landmarks: int, times: float) -> float:
    """RDS+'s cost over that of a setting with so many landmarks and a shortlist of `times` the budget.

    A JVP counts 1 + 2 k passes, as many as it needs; the paper counts two.
    """
    cost = FORWARD * passes(embedding) * POOL + GRADIENT * (landmarks + times * BUDGET)
    return FORWARD * POOL / cost


def times_within(embedding: EmbeddingOptions | None, *, landmarks: int, ratio: float) -> float:
    """The shortlist, in multiples of the budget, with which `by_formula` gives that ratio."""
    left = FORWARD * POOL * (1 / ratio - passes(embedding)) - GRADIENT * landmarks
    return max(left / (GRADIENT * BUDGET), 0.0)


def product_cap(pool: Pool, budget: int) -> float:
    """The shortlist that the product's default cap allows on this very pool, in multiples of the budget."""
    targets = [counts_of(samples) for samples in pool.targets.values()]
    target = max(targets, key=lambda counts: counts.tokens)
    counts = JobCounts(
        pool=counts_of(pool.samples), target=target, budget=budget, estimated=False, usable=pool.usable.size
    )
    return refine_cap(pool.shape, Parameters().model_dump(mode="json"), counts).samples / budget


class Measured:
    """Operations of the work that was really done on a pool and one of its targets."""

    def __init__(self, pool: Pool, projection_dim: int) -> None:
        self._shape, self._dim = pool.shape, projection_dim
        samples = pool.samples
        each = [counts_of(samples.slice(i, i + 1)) for i in range(len(samples))]
        self._gradient_n = np.array([self._gradients(counts) for counts in each])
        self._pool, self._targets = counts_of(samples), {name: counts_of(of) for name, of in pool.targets.items()}

    def rds(self, target: str) -> float:
        return self.embedding(RDS) + self._embedding(self._targets[target], RDS)

    def embedding(self, options: EmbeddingOptions | None) -> float:
        return self._embedding(self._pool, options)

    def ratio(self, target: str, embedding: EmbeddingOptions | None, exact: IntArray) -> float:
        """RDS+'s operations over those of an embedding of the pool and of gradients: of the target and of `exact`, (l,)."""
        cost = self.embedding(embedding) + float(self._gradient_n[exact].sum())
        return self.rds(target) / (cost + self._gradients(self._targets[target]))

    def _gradients(self, counts: TokenCounts) -> float:
        return operations.gradients(self._shape, counts, modules="down_proj", projection_dim=self._dim)

    def _embedding(self, counts: TokenCounts, options: EmbeddingOptions | None) -> float:
        return 0.0 if options is None else operations.embedding(self._shape, counts, asdict(options))
