"""The passes through the model that a job's parameters ask for: its gradients and its embeddings."""

from collections.abc import Mapping, Sequence
from typing import Any

from service.plan import operations
from service.plan.job_counts import JobCounts
from service.plan.landmark_count import landmark_count
from service.plan.operations import Shape, TokenCounts

Parameters = Mapping[str, Any]


def measured_shape(shape: Shape, parameters: Parameters) -> Shape:
    """The model that influence is measured on: with the adapters of the warm-up, where it trains any."""
    warmup = parameters["warmup"]
    if warmup is None or warmup["lora"] is None:
        return shape
    return shape.with_adapters(warmup["lora"]["rank"], warmup["lora"]["modules"])


def landmarks_of(parameters: Parameters, counts: JobCounts) -> float:
    """Number of landmarks; for `exact_influence` the whole of the pool."""
    if parameters["method"] == "exact_influence":
        return counts.selectable
    return float(landmark_count(parameters, int(counts.selectable)))


def gradients(shape: Shape, parameters: Parameters, counts: TokenCounts, *, is_scaled: bool) -> float:
    """Operations of the gradients of these samples; those of pool samples are scaled as the optimiser scales its step.

    Raises:
        ValueError: the layers that influence is measured on are not of this shape.
    """
    optimizer, gradient = parameters["optimizer"], parameters["gradient"]
    is_exact = is_scaled and optimizer["type"] in ("adam", "adamw") and optimizer["scaling"] == "exact"
    return operations.gradients(
        shape,
        counts,
        modules=gradient["modules"],
        projection_dim=gradient["projection_dim"],
        is_scaled_exactly=is_exact,
    )


def rds_plus(shape: Shape, parameters: Parameters, counts: JobCounts) -> float:
    """Operations of the embeddings that `rds_plus` would compare, of pool and target."""
    options = {**parameters["embedding"], "kind": "rds"}
    return sum(operations.embedding(shape, each, options) for each in (counts.pool, counts.target))


def offered_embeddings(shape: Shape, parameters: Parameters, counts: JobCounts) -> Sequence[Mapping[str, Any]]:
    """What `auto` chooses among: what the worker has said, or else will say."""
    if counts.candidates is not None:
        return counts.candidates
    embedding = parameters["embedding"]
    blocks = min(embedding["blocks"], shape.blocks)
    return [{**embedding, "kind": kind, "blocks": blocks} for kind in ("text", "text_hidden", "hidden")]


def pool_embedding(shape: Shape, parameters: Parameters, counts: JobCounts) -> Mapping[str, Any]:
    """What the pool is embedded with; of `auto`, the candidate that would cost most."""
    embedding: Mapping[str, Any] = parameters["embedding"]
    if parameters["method"] == "rds_plus":
        return {**embedding, "kind": "rds"}
    if embedding["kind"] != "auto":
        return embedding
    offered = offered_embeddings(shape, parameters, counts)
    return max(offered, key=lambda options: operations.embedding(shape, counts.pool, options))
