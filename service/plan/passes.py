"""The passes through the model that a job's parameters ask for: its gradients and its embeddings."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from service.plan import operations
from service.plan.job_counts import JobCounts
from service.plan.landmark_count import landmark_count
from service.plan.limits import COMPARED_LANDMARKS, LEAST_REFINE
from service.plan.operations import Shape, TokenCounts

Parameters = Mapping[str, Any]

_CHEAP = ("text", "text_hidden", "hidden")  # what `auto` always compares


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
    return [{**embedding, "kind": kind, "blocks": blocks} for kind in offered_kinds(shape, parameters, counts)]


def offered_kinds(shape: Shape | str, parameters: Parameters, counts: JobCounts) -> Sequence[str]:
    """The kinds of what `auto` chooses among; `output` is one where a forward pass of the pool is affordable.

    Args:
        shape: of the model; or why it is unknown.
    """
    if counts.candidates is not None:
        return [options["kind"] for options in counts.candidates]
    return (*_CHEAP, "output") if affords_output(shape, parameters, counts) else _CHEAP


def is_capped(refine: Mapping[str, Any]) -> bool:
    """Whether `max_cost` bounds what is refined, and a promise may end it."""
    return refine["size"] == "auto" and refine["share"] is None


def affords_output(shape: Shape | str, parameters: Parameters, counts: JobCounts) -> bool:
    """Whether `auto` may choose `output`: `max_cost` leaves enough to refine after it."""
    needed = output_from(shape, parameters, counts)
    return needed is not None and needed <= parameters["refine"]["max_cost"]


def output_from(shape: Shape | str, parameters: Parameters, counts: JobCounts) -> float | None:
    """The least `max_cost` with which `auto` compares `output`: `LEAST_REFINE` times the budget, or the rest of the pool where
    that is less, can then be refined within it. None where nothing is capped, or the model's operations cannot be counted.

    Args:
        shape: of the model; or why it is unknown.
    """
    if isinstance(shape, str) or not is_capped(parameters["refine"]):
        return None
    offered = [{**parameters["embedding"], "kind": kind} for kind in (*_CHEAP, "output")]
    landmarks = landmarks_of(parameters, counts)
    least = min(LEAST_REFINE * counts.budget, max(counts.selectable - landmarks, 0))
    try:
        shape = measured_shape(shape, parameters)
        each = gradients(shape, parameters, counts.drawn(1), is_scaled=True)
        needed = before_refining(shape, parameters, counts, offered[-1], offered) + least * each
    except ValueError:  # the layers that influence is measured on are not of this shape
        return None
    return needed / rds_plus(shape, parameters, counts)


def before_refining(
    shape: Shape,
    parameters: Parameters,
    counts: JobCounts,
    embedding: Mapping[str, Any],
    compared: Sequence[Mapping[str, Any]],
) -> float:
    """Operations of all that is computed before anything is refined, the pool being embedded with `embedding` and some landmarks
    with each of `compared`.

    Raises:
        ValueError: as `gradients`.
    """
    landmarks = landmarks_of(parameters, counts)
    few = counts.drawn(min(landmarks, COMPARED_LANDMARKS))
    return math.fsum(
        [
            landmarks * gradients(shape, parameters, counts.drawn(1), is_scaled=True),
            gradients(shape, parameters, counts.target, is_scaled=False),
            operations.embedding(shape, counts.pool, embedding),
            *(operations.embedding(shape, few, options) for options in compared),
        ]
    )


def pool_embedding(shape: Shape, parameters: Parameters, counts: JobCounts) -> Mapping[str, Any]:
    """What the pool is embedded with; of `auto`, the candidate that would cost most."""
    embedding: Mapping[str, Any] = parameters["embedding"]
    if parameters["method"] == "rds_plus":
        return {**embedding, "kind": "rds"}
    if embedding["kind"] != "auto":
        return embedding
    offered = offered_embeddings(shape, parameters, counts)
    return max(offered, key=lambda options: operations.embedding(shape, counts.pool, options))
