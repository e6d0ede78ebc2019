"""What each stage of a job costs in operations, bytes and memory, from the model's shape and counts of tokens (METHOD 3).

Symbols as in METHOD: n samples of the pool, t targets, l landmarks, k values a gradient, e values an embedding, r directions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.plan import operations, passes
from service.plan.job_counts import JobCounts
from service.plan.limits import (
    COMPARED_LANDMARKS,
    FITS_CHOSEN_ON,
    HELD_OUT_FROM,
    KERNEL_ROWS,
    LANDMARKS_PER_DIRECTION,
    MAX_CENTRES,
    VALIDATION_SAMPLES,
)
from service.plan.operations import Shape, TokenCounts
from service.plan.passes import Parameters
from service.plan.refine_cap import refined_samples
from service.plan.shards import EMBED_SHARD_TOKENS, GRADIENT_SHARD_TOKENS, MAX_SHARDS
from service.plan.stages import JobInputs, Stage
from service.plan.waves import rehearse

_PROCESS_BYTES = 600 * 2**20  # of a compute process without a model
_DIRECTION_BYTES = 2 * 2**30  # of curvature directions, at a time
_HEAD_BYTES = 384 * 2**20  # of pieces: four of logits and what derives from them, and one of gradients
_WEIGHT_BYTES = {"int8": 1.0, "nf4": 0.6}
_SIGNATURE_BYTES = 80  # of a row of the pool, by which repeats are found
_SOLVER_STEPS = 1000
_RIDGES = 5  # of which one is chosen where none is given


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """`operations` is 0 if a stage's time depends on its samples and not on products; `memory_bytes` is of its process."""

    operations: float
    samples: float
    artifact_bytes: float = 0.0
    memory_bytes: float = _PROCESS_BYTES


def stages_of(parameters: Parameters, counts: JobCounts) -> list[Stage]:
    """The stages that a job of these parameters goes through, in order."""
    job = JobInputs(model={}, pool="pool", target="target", budget=counts.budget, parameters=parameters)
    return list(rehearse(job, counts.selectable))


def _shard(counts: TokenCounts, shard_tokens: int) -> float:
    """Tokens of a shard."""
    return min(counts.tokens, max(shard_tokens, counts.tokens / MAX_SHARDS))


class StageCosts:
    """Of one job.

    Raises:
        ValueError: the layers that influence is measured on are not of this shape.
    """

    def __init__(self, shape: Shape, parameters: Parameters, counts: JobCounts, dtype: str, token_budget: int) -> None:
        shape = passes.measured_shape(shape, parameters)
        self._shape, self._parameters, self._counts = shape, parameters, counts
        self._token_budget = token_budget
        self._bytes = 4 if dtype == "float32" else 2
        self._stages = stages_of(parameters, counts)
        self._n, self._t = counts.pool.samples, counts.target.samples
        self._l = passes.landmarks_of(parameters, counts)
        self._refined = refined_samples(shape, parameters, counts) if Stage.REFINE in self._stages else 0
        self._modules = parameters["gradient"]["modules"]
        self._layers = shape.measured(self._modules)
        self._k = operations.gradient_size(self._layers, parameters["gradient"]["projection_dim"])
        self._r = parameters["curvature"]["rank"] if parameters["curvature"]["type"] in ("ggn", "hessian") else 0
        self._embedding = passes.pool_embedding(shape, parameters, counts)
        self._e = operations.embedding_width(shape, self._embedding)

    def all(self) -> dict[Stage, StageCost]:
        """Of the stages that the job goes through, in order."""
        costs: dict[Stage, Callable[[], StageCost]] = {
            Stage.PREPARE: self._prepare,
            Stage.WARMUP: self._warmup,
            Stage.LANDMARK_GRADIENTS: lambda: self._gradients(self._counts.drawn(self._l), is_scaled=True),
            Stage.TARGET_GRADIENTS: lambda: self._gradients(self._counts.target, is_scaled=False),
            Stage.CANDIDATES: lambda: self._embed(
                self._counts.drawn(min(self._l, COMPARED_LANDMARKS)), self._offered()
            ),
            Stage.CHOOSE_EMBEDDING: self._choose,
            Stage.CURVATURE: self._curvature,
            Stage.EMBED: lambda: self._embed(self._counts.pool, [self._embedding]),
            Stage.EMBED_TARGET: lambda: self._embed(self._counts.target, [self._embedding]),
            Stage.PROPAGATE: self._propagate,
            Stage.REFINE: lambda: self._gradients(self._counts.drawn(self._refined), is_scaled=True),
            Stage.SELECT: self._select,
            Stage.VALIDATE: self._validate,
        }
        return {stage: costs[stage]() for stage in self._stages}

    def _offered(self) -> Sequence[Mapping[str, Any]]:
        return passes.offered_embeddings(self._shape, self._parameters, self._counts)

    def _memory(self, activations: float, tokens: float, extra: float = 0.0) -> float:
        """Bytes of a process with the model, the activations (values per token) of a batch of these tokens, and `extra` bytes. A
        batch holds as many tokens as the budget allows, or one longer sample."""
        weight = _WEIGHT_BYTES.get(self._parameters["quantization"], self._bytes)
        batch: float = min(max(self._token_budget, self._parameters["max_length"]), tokens)
        return _PROCESS_BYTES + weight * self._shape.weights + self._bytes * batch * activations + extra

    def _activations(self, blocks: int) -> float:
        """Values per token that a backward pass through the blocks keeps: each layer's output, the MLP's own products, five
        hidden states."""
        shape = self._shape
        return blocks * (sum(out for out, _ in shape.layers.values()) + sum(self._inner()) + 5 * shape.hidden)

    def _forward_activations(self) -> float:
        """Values per token that a pass without a backward holds at once: three inner states of an MLP, five hidden states."""
        return 3 * max(self._inner()) + 5 * self._shape.hidden

    def _inner(self) -> list[int]:
        """Widths of the MLP's inner layers."""
        layers = self._shape.layers.items()
        return [out for name, (out, _) in layers if name.startswith("mlp.") and out != self._shape.hidden]

    def _prepare(self) -> StageCost:
        tokens = self._counts.pool.tokens + self._counts.drawn(self._l).tokens + self._counts.target.tokens
        bytes_ = 5 * tokens + _SIGNATURE_BYTES * self._n
        return StageCost(operations=0, samples=self._n + self._t, artifact_bytes=bytes_)

    def _warmup(self) -> StageCost:
        warmup = self._parameters["warmup"]
        counts = self._counts.drawn(min(warmup["samples"], self._counts.selectable))
        each = operations.forward(self._shape, counts) + operations.backward(self._shape, counts)
        trained = self._shape.weights
        if warmup["lora"] is None:
            each += operations.forward(self._shape, counts)  # the weights' own gradients
        else:
            trained = sum(out * into for _, (out, into) in self._layers)
            each += sum(2 * counts.tokens * out * into for _, (out, into) in self._layers)
        batch = counts.scaled(min(warmup["batch_size"], counts.samples))
        return StageCost(
            operations=warmup["epochs"] * each,
            samples=warmup["epochs"] * counts.samples,
            artifact_bytes=12 * trained,
            memory_bytes=self._memory(self._activations(self._shape.blocks), batch.tokens, 16 * trained),
        )

    def _gradients(self, counts: TokenCounts, *, is_scaled: bool) -> StageCost:
        return StageCost(
            operations=passes.gradients(self._shape, self._parameters, counts, is_scaled=is_scaled),
            samples=counts.samples,
            artifact_bytes=4 * counts.samples * self._k,
            memory_bytes=self._memory(
                self._activations(self._shape.blocks),
                _shard(counts, GRADIENT_SHARD_TOKENS),
                4 * self._k * min(counts.samples, 1000),
            ),
        )

    def _embed(self, counts: TokenCounts, offered: Sequence[Mapping[str, Any]]) -> StageCost:
        widths = sum(operations.embedding_width(self._shape, options) for options in offered)
        tangents = max(1 + options["tangents"] if options["kind"] == "jvp" else 1 for options in offered)
        head = _HEAD_BYTES if any(options["kind"] == "output" for options in offered) else 0
        memory = self._memory(tangents * self._forward_activations(), _shard(counts, EMBED_SHARD_TOKENS), head)
        if all(options["kind"] == "text" for options in offered):  # no model
            memory = _PROCESS_BYTES + 8 * self._shape.vocabulary * operations.TEXT_DIRECTIONS
        return StageCost(
            operations=math.fsum(operations.embedding(self._shape, counts, options) for options in offered),
            samples=len(offered) * counts.samples,
            artifact_bytes=2 * counts.samples * widths,
            memory_bytes=memory,
        )

    def _fit(self, e: int, exact: float) -> float:
        """Of the kernel ridge regression from e values of the exact samples to every target: for each kernel that is tried the
        kernel, for each ridge the Cholesky factor and its inverse, on some of the samples where they are many; and the fit of the
        best to all of them. Of more than `MAX_CENTRES`: two passes over the kernel with the centres, and products of these."""
        kernel, columns = self._parameters["kernel"], self._columns()
        kernels = 2 if kernel["kind"] == "auto" else 1
        ridges = _RIDGES if kernel["ridge"] is None else 1

        def whole(count: float, ridges: int) -> float:
            return 2 * count**2 * e + ridges * (2 * count**2 * columns + count**3)

        tried = kernels * whole(min(exact, FITS_CHOSEN_ON), ridges) if kernels * ridges > 1 else 0.0
        if tried and exact <= FITS_CHOSEN_ON:
            return tried
        if exact <= MAX_CENTRES:
            return tried + whole(exact, 1)
        z = MAX_CENTRES
        return tried + 4 * exact * z * (e + z + columns) + 3 * z**3

    def _columns(self) -> float:
        return self._t + (self._r + 1 if self._r else 0)

    def _kernel_memory(self, exact: float) -> float:
        """Matrices of the centres, of which a fit by some of the samples needs more; the samples' embeddings and influence."""
        z = min(exact, MAX_CENTRES)
        matrices = (2 if exact <= MAX_CENTRES else 5) * z**2
        rows = exact * (self._e + 3 * self._columns()) + KERNEL_ROWS * (z + self._columns())
        return _PROCESS_BYTES + 8 * (matrices + rows) + 4 * (self._l + self._t) * self._k

    def _choose(self) -> StageCost:
        widths = [operations.embedding_width(self._shape, options) for options in self._offered()]
        return StageCost(
            operations=math.fsum(self._fit(e, self._l) for e in widths) + 2 * self._l * self._t * self._k,
            samples=self._l,
            memory_bytes=self._kernel_memory(self._l),
        )

    def _curvature(self) -> StageCost:
        """Directions from the landmarks, and the products of the targets' curvature with each of them."""
        shape, targets = self._shape, self._counts.target
        weights = sum(out * into for _, (out, into) in self._layers)
        if not self._r:  # fisher: the targets' gradients along the optimiser's drift
            total = operations.full_gradients(shape, targets, modules=self._modules)
            return StageCost(
                operations=total,
                samples=self._t,
                memory_bytes=self._memory(self._activations(shape.blocks), targets.tokens),
            )
        once, each = self._curvature_passes(targets)
        at_once = min(self._r, max(1, _DIRECTION_BYTES // (16 * weights)))
        landmarks = self._counts.drawn(min(self._l, LANDMARKS_PER_DIRECTION * self._r))
        gradients = operations.full_gradients(shape, landmarks, modules=self._modules, directions=at_once)
        # One more where one half has a curvature of its own.
        directed = (2 if self._t < HELD_OUT_FROM else 3) * gradients
        chunks = math.ceil(self._r / at_once)
        return StageCost(
            operations=chunks * (directed + once) + self._r * each + 24 * self._l * self._k * self._r,
            samples=self._t,
            artifact_bytes=4 * self._r * self._k,
            memory_bytes=self._memory(1.3 * self._activations(shape.blocks), targets.tokens, 16 * weights * at_once),
        )

    def _curvature_passes(self, targets: TokenCounts) -> tuple[float, float]:
        kind = self._parameters["curvature"]["type"]
        return operations.curvature(self._shape, targets, kind=kind, modules=self._modules)

    def _propagate(self) -> StageCost:
        """Once, and again after each round of refining, of which a promise that is met early saves some."""
        n, columns, explained = self._n, self._columns(), 0.0
        if Stage.LANDMARK_GRADIENTS not in self._stages:  # rds_plus: cosines
            total, memory = 2 * n * self._t * self._e, _PROCESS_BYTES + 4.0 * (n + self._t) * self._e
        elif Stage.EMBED in self._stages:
            rounds = min(self._parameters["refine"]["rounds"], self._refined)
            exact = [self._l + self._refined * done / rounds for done in range(rounds + 1)] if rounds else [self._l]
            centres = [min(each, MAX_CENTRES) for each in exact]
            fits = math.fsum(self._fit(self._e, each) for each in exact)
            total = fits + math.fsum(2 * n * each * (self._e + columns) for each in centres)
            # Exact influence is read from the gradients anew each time.
            total += math.fsum(2 * each * columns * self._k for each in exact)
            memory, explained = self._kernel_memory(exact[-1]), centres[-1] * (2 * self._e + 12 * (self._t + 1))
        else:
            total, memory = 2 * self._l * columns * self._k, _PROCESS_BYTES + 4.0 * (self._t + 1000) * self._k
        kept = 4 * n * columns + explained
        return StageCost(operations=total, samples=n, artifact_bytes=kept, memory_bytes=memory)

    def _select(self) -> StageCost:
        chosen, total = self._l + self._refined if self._refined else self._n, 0.0
        if self._parameters["curvature"]["type"] != "none":
            total = _SOLVER_STEPS * 4 * chosen * (self._r or self._t)
        bytes_ = 10 * self._n + 8 * self._counts.budget
        memory = _PROCESS_BYTES + 12 * chosen * self._columns() + 32 * self._n
        return StageCost(operations=total, samples=self._n, artifact_bytes=bytes_, memory_bytes=memory)

    def _validate(self) -> StageCost:
        """A step each on the selection and on as many random samples; a step on the choice from half of the targets, where
        half were held out. Each step's loss before and after, and the change that was predicted."""
        arms, sets = (3, 3) if self._t >= HELD_OUT_FROM else (2, 2)
        chosen, targets = self._counts.drawn(min(self._counts.budget, VALIDATION_SAMPLES)), self._counts.target
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
            memory_bytes=self._memory(self._activations(self._shape.blocks), targets.tokens, 16 * weights + widened),
        )
