"""What each stage of a job costs in operations, bytes and memory, from the model's shape and counts of tokens (METHOD 3).

Symbols as in METHOD: n samples of the pool, t targets, l landmarks, k values a gradient, e values an embedding, r directions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.jobs import operations
from service.jobs.operations import Shape, TokenCounts
from service.jobs.state import Stage

Parameters = Mapping[str, Any]

_PROCESS_BYTES = 600 * 2**20  # of a compute process without a model
_BATCH_TOKENS = 16_384  # of a padded batch on an accelerator; far fewer on a processor
_ROWS = 4096  # of the kernel, at a time
_DIRECTION_BYTES = 2 * 2**30  # of curvature directions, at a time
_WEIGHT_BYTES = {"int8": 1.0, "nf4": 0.6}
_SOLVER_STEPS = 1000
_MOST_COMPARED = 1024  # landmarks that candidate embeddings are compared on
_LANDMARKS_A_DIRECTION = 8
_RIDGES = 5  # of which one is chosen where none is given
_HELD_OUT_FROM = 16  # targets
VALIDATION_SAMPLES = 16
"""Of a step of the validation at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCounts:
    """What a job is about, in numbers. `estimated`: not counted, but estimated from bytes."""

    pool: TokenCounts
    target: TokenCounts
    budget: int
    estimated: bool
    usable: int | None = None
    candidates: Sequence[Mapping[str, Any]] | None = None
    dtype: str | None = None

    @property
    def selectable(self) -> float:
        """Samples of the pool that have a response; before that is known, all of them."""
        return self.pool.samples if self.usable is None else self.usable

    @classmethod
    def of_prepared(cls, prepared: Mapping[str, Any], budget: int) -> "JobCounts":
        """Counted: from the result of the prepare stage."""
        return cls(
            pool=TokenCounts.of_summary(prepared["pool_counts"]),
            target=TokenCounts.of_summary(prepared["target_counts"]),
            budget=budget,
            estimated=False,
            usable=prepared.get("usable"),
            candidates=prepared.get("candidates"),
            dtype=prepared["dtype"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """`operations` is 0 where a stage's time goes with its samples and not with products; `memory_bytes` is of its process."""

    operations: float
    samples: float
    artifact_bytes: float = 0.0
    memory_bytes: float = _PROCESS_BYTES


def stages_of(parameters: Parameters, counts: JobCounts) -> list[Stage]:
    """The stages that a job of these parameters goes through, in order."""
    method, embedding = parameters["method"], parameters["embedding"]["kind"]
    has_gradients = method in ("influence_distillation", "exact_influence")
    propagates = method == "influence_distillation" and parameters["landmarks"]["count"] < counts.selectable
    is_auto = propagates and embedding == "auto"
    kind, optimizer = parameters["curvature"]["type"], parameters["optimizer"]
    drifts = optimizer["type"] in ("adam", "adamw") or optimizer["momentum"] or optimizer["weight_decay"]
    needed = {
        Stage.PREPARE: True,
        Stage.WARMUP: parameters["warmup"] is not None,
        Stage.LANDMARK_GRADIENTS: has_gradients,
        Stage.TARGET_GRADIENTS: has_gradients,
        Stage.CANDIDATES: is_auto,
        Stage.CHOOSE_EMBEDDING: is_auto,
        Stage.CURVATURE: kind in ("ggn", "hessian") or (kind == "fisher" and drifts),
        Stage.EMBED: propagates or method == "rds_plus",
        Stage.EMBED_TARGET: method == "rds_plus",
        Stage.PROPAGATE: method != "random",
        Stage.REFINE: propagates and parameters["refine"] > 0,
        Stage.SELECT: True,
        Stage.VALIDATE: parameters["validate"],
        Stage.PUBLISH: True,
    }
    return [stage for stage in Stage if needed[stage]]


class StageCosts:
    """Of one job.

    Raises:
        ValueError: the layers that influence is measured on are not of this shape.
    """

    def __init__(self, shape: Shape, parameters: Parameters, counts: JobCounts, dtype: str) -> None:
        warmup = parameters["warmup"]
        if warmup is not None and warmup["lora"] is not None:
            shape = shape.with_adapters(warmup["lora"]["rank"], warmup["lora"]["modules"])
        self._shape, self._parameters, self._counts = shape, parameters, counts
        self._bytes = 4 if dtype == "float32" else 2
        self._stages = stages_of(parameters, counts)
        self._n, self._t = counts.pool.samples, counts.target.samples
        self._is_exact = parameters["method"] == "exact_influence"
        self._l = counts.selectable if self._is_exact else min(counts.selectable, parameters["landmarks"]["count"])
        self._modules = parameters["gradient"]["modules"]
        self._layers = shape.measured(self._modules)
        self._k = operations.gradient_size(self._layers, parameters["gradient"]["projection_dim"])
        self._r = parameters["curvature"]["rank"] if parameters["curvature"]["type"] in ("ggn", "hessian") else 0
        self._embedding = self._dearest_embedding()
        self._e = operations.embedding_width(shape, self._embedding)

    def all(self) -> dict[Stage, StageCost]:
        """Of the stages that the job goes through, in order."""
        costs: dict[Stage, Callable[[], StageCost]] = {
            Stage.PREPARE: self._prepare,
            Stage.WARMUP: self._warmup,
            Stage.LANDMARK_GRADIENTS: lambda: self._gradients(self._counts.pool.scaled(self._l), is_scaled=True),
            Stage.TARGET_GRADIENTS: lambda: self._gradients(self._counts.target, is_scaled=False),
            Stage.CANDIDATES: self._candidates,
            Stage.CHOOSE_EMBEDDING: self._choose,
            Stage.CURVATURE: self._curvature,
            Stage.EMBED: lambda: self._embed(self._counts.pool, [self._embedding]),
            Stage.EMBED_TARGET: lambda: self._embed(self._counts.target, [self._embedding]),
            Stage.PROPAGATE: self._propagate,
            Stage.REFINE: lambda: self._gradients(self._counts.pool.scaled(self._shortlist()), is_scaled=True),
            Stage.SELECT: self._select,
            Stage.VALIDATE: self._validate,
            Stage.PUBLISH: lambda: StageCost(operations=0, samples=self._n),
        }
        return {stage: costs[stage]() for stage in self._stages}

    def _offered(self) -> Sequence[Mapping[str, Any]]:
        if self._counts.candidates is not None:
            return self._counts.candidates
        embedding = self._parameters["embedding"]
        blocks = min(embedding["blocks"], self._shape.blocks)
        poolings = [embedding["pooling"]] if embedding["pooling"] is not None else ["response", "last"]
        return [{**embedding, "kind": "hidden", "pooling": pooling, "blocks": blocks} for pooling in poolings]

    def _dearest_embedding(self) -> Mapping[str, Any]:
        """What the pool is embedded with; of `auto`, the candidate that would cost most."""
        embedding: Mapping[str, Any] = self._parameters["embedding"]
        if self._parameters["method"] == "rds_plus":
            return {**embedding, "kind": "rds"}
        if embedding["kind"] != "auto":
            return embedding
        return max(self._offered(), key=lambda o: operations.embedding(self._shape, self._counts.pool, o))

    def _memory(self, activations: float, extra: float = 0.0) -> float:
        """A process with the model loaded, a batch's activations (values a token) and what comes on top (bytes)."""
        weight = _WEIGHT_BYTES.get(self._parameters["quantization"], self._bytes)
        longest: int = min(self._parameters["max_length"], _BATCH_TOKENS)
        return _PROCESS_BYTES + weight * self._shape.weights + self._bytes * longest * activations + extra

    def _activations(self, blocks: int) -> float:
        """Values a token that a backward pass through the blocks keeps: about each layer's output, and the norms'."""
        return blocks * (sum(out for out, _ in self._shape.layers.values()) + 4 * self._shape.hidden)

    def _prepare(self) -> StageCost:
        tokens = self._counts.pool.scaled(self._n + self._l).tokens + self._counts.target.tokens
        return StageCost(operations=0, samples=self._n + self._t, artifact_bytes=5 * tokens)

    def _warmup(self) -> StageCost:
        warmup = self._parameters["warmup"]
        counts = self._counts.pool.scaled(min(warmup["samples"], self._n))
        passes = operations.forward(self._shape, counts) + operations.backward(self._shape, counts)
        trained = self._shape.weights
        if warmup["lora"] is None:
            passes += operations.forward(self._shape, counts)  # the weights' own gradients
        else:
            trained = sum(out * into for _, (out, into) in self._layers)
            passes += sum(2 * counts.tokens * out * into for _, (out, into) in self._layers)
        return StageCost(
            operations=warmup["epochs"] * passes,
            samples=warmup["epochs"] * counts.samples,
            artifact_bytes=12 * trained,
            memory_bytes=self._memory(self._activations(self._shape.blocks), 16 * trained),
        )

    def _gradients(self, counts: TokenCounts, *, is_scaled: bool) -> StageCost:
        optimizer = self._parameters["optimizer"]
        return StageCost(
            operations=operations.gradients(
                self._shape,
                counts,
                modules=self._modules,
                projection_dim=self._parameters["gradient"]["projection_dim"],
                is_scaled_exactly=is_scaled
                and optimizer["type"] in ("adam", "adamw")
                and optimizer["scaling"] == "exact",
            ),
            samples=counts.samples,
            artifact_bytes=4 * counts.samples * self._k,
            memory_bytes=self._memory(self._activations(self._shape.blocks), 4 * self._k * min(counts.samples, 1000)),
        )

    def _embed(self, counts: TokenCounts, offered: Sequence[Mapping[str, Any]]) -> StageCost:
        widths = sum(operations.embedding_width(self._shape, options) for options in offered)
        return StageCost(
            operations=math.fsum(operations.embedding(self._shape, counts, options) for options in offered),
            samples=len(offered) * counts.samples,
            artifact_bytes=2 * counts.samples * widths,
            memory_bytes=self._memory(2 * self._activations(1)),
        )

    def _candidates(self) -> StageCost:
        return self._embed(self._counts.pool.scaled(min(self._l, _MOST_COMPARED)), self._offered())

    def _fit(self, e: int) -> float:
        """Of the kernel ridge regression from e values to every target: the kernel, and of each ridge that is tried the Cholesky
        factor and its inverse."""
        tried = _RIDGES if self._parameters["kernel"]["ridge"] is None else 1
        return 2 * self._l**2 * e + tried * (2 * self._l**2 * self._columns() + self._l**3)

    def _columns(self) -> float:
        return self._t + (self._r + 1 if self._r else 0)

    def _kernel_memory(self) -> float:
        kernel = 8 * (2 * self._l**2 + (self._l + _ROWS) * (self._columns() + self._l))
        return _PROCESS_BYTES + kernel + 4 * (self._l + self._t) * self._k + 4 * self._l * self._e

    def _choose(self) -> StageCost:
        widths = [operations.embedding_width(self._shape, options) for options in self._offered()]
        return StageCost(
            operations=math.fsum(self._fit(e) for e in widths) + 2 * self._l * self._t * self._k,
            samples=self._l,
            memory_bytes=self._kernel_memory(),
        )

    def _curvature(self) -> StageCost:
        """Directions from the landmarks, and the products of the targets' curvature with each of them."""
        shape, targets = self._shape, self._counts.target
        weights = sum(out * into for _, (out, into) in self._layers)
        if not self._r:  # fisher: the targets' gradients along the optimiser's drift
            total = operations.full_gradients(shape, targets, modules=self._modules)
            return StageCost(
                operations=total, samples=self._t, memory_bytes=self._memory(self._activations(shape.blocks))
            )
        once, each = self._curvature_passes(targets)
        at_once = min(self._r, max(1, _DIRECTION_BYTES // (16 * weights)))
        landmarks = self._counts.pool.scaled(min(self._l, _LANDMARKS_A_DIRECTION * self._r))
        passes = 2 * operations.full_gradients(shape, landmarks, modules=self._modules, directions=at_once)
        chunks = math.ceil(self._r / at_once)
        return StageCost(
            operations=chunks * (passes + once) + self._r * each + 24 * self._l * self._k * self._r,
            samples=self._t,
            artifact_bytes=4 * self._r * self._k,
            memory_bytes=self._memory(3 * self._activations(shape.blocks), 16 * weights * at_once),
        )

    def _curvature_passes(self, targets: TokenCounts) -> tuple[float, float]:
        """Of the products of `ggn` or `hessian` with directions: what they share, and what each costs."""
        passes = operations.forward(self._shape, targets) + operations.backward(self._shape, targets)
        outer = operations.full_gradients(self._shape, targets, modules=self._modules) - passes
        # Down to the hidden states and back, through the first derivative too for the exact Hessian. The factors are those
        # of the products that really ran.
        is_ggn = self._parameters["curvature"]["type"] == "ggn"
        return passes + outer, (1.25 * passes + 2 * outer if is_ggn else 2.1 * passes + 3 * outer)

    def _propagate(self) -> StageCost:
        n, columns, explained = self._n, self._columns(), 0.0
        if Stage.LANDMARK_GRADIENTS not in self._stages:  # rds_plus: cosines
            total, memory = 2 * n * self._t * self._e, _PROCESS_BYTES + 4.0 * (n + self._t) * self._e
        else:
            total, memory = 2 * self._l * columns * self._k, self._kernel_memory()
            if Stage.EMBED in self._stages:
                total += self._fit(self._e) + 2 * n * self._l * (self._e + columns)
                explained = self._l * (2 * self._e + 12 * (self._t + 1))
            else:
                memory = _PROCESS_BYTES + 4.0 * (self._t + 1000) * self._k
        kept = 4 * n * columns + explained
        return StageCost(operations=total, samples=n, artifact_bytes=kept, memory_bytes=memory)

    def _shortlist(self) -> float:
        """Samples of the shortlist; it holds no landmarks."""
        return float(min(max(self._parameters["refine"] * self._n, self._counts.budget), self._n - self._l))

    def _select(self) -> StageCost:
        chosen = self._l + self._shortlist() if Stage.REFINE in self._stages else self._n
        total = 2 * self._shortlist() * self._columns() * self._k if Stage.REFINE in self._stages else 0.0
        if self._parameters["curvature"]["type"] != "none":
            total += _SOLVER_STEPS * 4 * chosen * (self._r or self._t)
        bytes_ = 10 * self._n + 8 * self._counts.budget
        if Stage.REFINE in self._stages:  # the shortlist's influence on each target
            bytes_ += self._shortlist() * (4 * self._t + 8)
        memory = _PROCESS_BYTES + 12 * chosen * self._columns() + 32 * self._n
        return StageCost(operations=total, samples=self._n, artifact_bytes=bytes_, memory_bytes=memory)

    def _validate(self) -> StageCost:
        """A step each on the selection and on as many random samples; a step on the choice from half of the targets, where
        half were held out. Each step's loss before and after, and the change that was predicted."""
        arms, sets = (3, 3) if self._t >= _HELD_OUT_FROM else (2, 2)
        chosen, targets = self._counts.pool.scaled(min(self._counts.budget, VALIDATION_SAMPLES)), self._counts.target
        steps = arms * operations.full_gradients(self._shape, chosen, modules=self._modules)
        linear = operations.full_gradients(self._shape, targets, modules=self._modules)
        second = {"none": 0.0, "fisher": linear}.get(self._parameters["curvature"]["type"])
        if second is None:
            second = sum(self._curvature_passes(targets))
        weights = sum(out * into for _, (out, into) in self._layers)
        widened = 0 if self._parameters["quantization"] != "none" else (4 - self._bytes) * self._shape.weights
        return StageCost(
            operations=steps + sets * (2 * operations.forward(self._shape, targets) + linear + second),
            samples=arms * chosen.samples,
            memory_bytes=self._memory(self._activations(self._shape.blocks), 16 * weights + widened),
        )
