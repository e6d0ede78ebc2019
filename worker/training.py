"""The warm-up: training on a few samples before influence is measured (METHOD 7).

The loss is the one whose gradients are measured: of each sample the mean cross-entropy of its predicted response tokens, of a
step the mean over its samples. Dropout is off, gradients are not clipped, and the learning rate is constant after a linear rise
over the first 3 % of the steps: so the optimiser's state is that of the plain loss, at the requested learning rate.

Shape suffixes: B samples of a pass, T tokens, D hidden size, R response positions, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from worker.errors import OutOfMemory, ParameterError
from worker.influence import OptimizerOptions, Progress, Samples, token_batches
from worker.influence.backward import LOGIT_BYTES
from worker.influence.batching import marked_positions, padded
from worker.influence.causal_lm import check_head, check_samples, head_logits, hidden_states, parameter_device
from worker.influence.samples import BoolArray, IntArray, last_marked

Report = Callable[[int, int, float, float], None]
"""Called after each step with (steps done, steps in all, the loss before the step, the learning rate of the step)."""

_RISE = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How to train. `optimizer` gives AdamW, or Adam where that is its type, its betas, eps and weight decay; the learning rate
    is separate. `token_budget` bounds the padded tokens of one pass; a batch is as many passes as it needs."""

    epochs: int
    learning_rate: float
    batch_size: int
    optimizer: OptimizerOptions
    seed: int
    token_budget: int

    def steps(self, samples: int) -> int:
        return self.epochs * -(-samples // self.batch_size)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / math.ceil(_RISE * steps))


def train(
    model: Any,
    parameters: Mapping[str, nn.Parameter],
    samples: Samples,
    training: Training,
    *,
    report: Report,
    progress: Progress,
    weights: npt.NDArray[np.float64] | None = None,
) -> tuple[torch.optim.Optimizer, list[float]]:
    """Trains the named parameters in place; returns the optimiser with its state, and the loss of each step before it.

    The order of the samples comes from the seed; on one machine two runs end in the same bits. `progress` is called after each
    pass with (samples done, samples in all); what it raises ends the training. `weights` (n,), of mean 1, multiply the samples'
    losses; None: all count the same.

    Raises:
        ValueError: a sample has no predicted token, or does not fit the model.
        ParameterError: the loss or its gradient stopped being finite.
        OutOfMemory: the optimiser or a single sample does not fit the device.
    """
    check_samples(model, samples)
    if not len(samples) or not samples.predicted().all():
        raise ValueError("the warm-up needs samples, each with at least one predicted response token")
    model.eval()
    model.requires_grad_(False)
    check_head(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = _optimizer(list(parameters.values()), training)
    run = _Run(model, samples, training.token_budget, np.ones(len(samples)) if weights is None else weights)
    losses: list[float] = []
    steps = training.steps(len(samples))
    done, total = 0, training.epochs * len(samples)
    with _deterministic():
        for batch in _batches(len(samples), training):
            optimizer.param_groups[0]["lr"] = rate = training.rate(len(losses), steps)
            before = done
            loss = run.gradient(batch, lambda passed, before=before: progress(before + passed, total))  # type: ignore[misc]
            _step(optimizer, loss, len(losses), training)
            losses.append(loss)
            done += batch.size
            report(len(losses), steps, loss, rate)
    return optimizer, losses


def _optimizer(parameters: list[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    options = training.optimizer
    kind = torch.optim.Adam if options.type == "adam" else torch.optim.AdamW
    return kind(
        parameters,
        lr=training.learning_rate,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
    )


def _batches(count: int, training: Training) -> Iterator[IntArray]:
    random = np.random.default_rng([training.seed, 0x3A1])
    for _ in range(training.epochs):
        order = random.permutation(count)
        for start in range(0, count, training.batch_size):
            yield order[start : start + training.batch_size]


def _step(optimizer: torch.optim.Optimizer, loss: float, step: int, training: Training) -> None:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not math.isfinite(loss) or not bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
        raise ParameterError(
            f"The warm-up's loss or gradient is not finite at step {step + 1} (loss {loss:.4g}): lower warmup.learning_rate,"
            f" now {training.learning_rate:g}; if this is the first step, a sample of the pool is the cause."
        )
    try:
        optimizer.step()
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            "The warm-up's optimizer does not fit on the device (16 bytes per trained parameter, including gradient and weight):"
            " use warmup.lora."
        ) from error
    optimizer.zero_grad()


@dataclass(slots=True)
class _Run:
    model: Any
    samples: Samples
    token_budget: int
    weights: npt.NDArray[np.float64]
    counted: BoolArray = field(init=False)
    lengths: IntArray = field(init=False)

    def __post_init__(self) -> None:
        self.counted = self.samples.predictable()
        # What follows the last response token has no part in the loss.
        self.lengths = last_marked(self.counted, self.samples.offsets)

    def gradient(self, batch: IntArray, progress: Callable[[int], None]) -> float:
        """Accumulates the gradient of the batch's mean loss, and returns that loss. What does not fit is cut smaller."""
        while True:
            passes = token_batches(self.lengths[batch], self.token_budget)
            try:
                return self._accumulate([batch[part] for part in passes], progress)
            except torch.OutOfMemoryError as error:
                if max(part.size for part in passes) == 1:
                    raise OutOfMemory(
                        f"A single sample of {self.lengths[batch].max()} tokens does not fit on the device during the warm-up:"
                        " lower max_length, or use warmup.lora."
                    ) from error
            # The failed backward pass may have added to some gradients already: the whole batch is repeated.
            self.model.zero_grad()
            self.token_budget = max(self.token_budget // 2, 1)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _accumulate(self, passes: list[IntArray], progress: Callable[[int], None]) -> float:
        size = sum(indices.size for indices in passes)
        total, done = 0.0, 0
        for indices in passes:
            loss = self._loss(indices, size)
            loss.backward()
            total += float(loss.detach())
            done += indices.size
            progress(done)
        return total

    def _loss(self, indices: IntArray, size: int) -> Tensor:
        """The share of these samples in the mean loss of a batch of `size`."""
        samples, device = self.samples, parameter_device(self.model)
        ids_BT = padded(samples, indices, self.lengths, device)
        rows, positions = marked_positions(self.counted, samples, indices)
        labels = samples.input_ids[samples.offsets[indices][rows] + positions].astype(np.int64)
        hidden_BTD = hidden_states(self.model, self.model.base_model, ids_BT)
        share_R = self.weights[indices][rows] / (size * np.bincount(rows)[rows])
        weights_R = torch.from_numpy(share_R).to(hidden_BTD.device, torch.float32)
        labels_R = torch.from_numpy(labels).to(hidden_BTD.device)
        hidden_RD = hidden_BTD[torch.from_numpy(rows), torch.from_numpy(positions - 1)]
        step = max(LOGIT_BYTES // (self.model.get_output_embeddings().weight.shape[0] * 4), 1)
        parts = zip(hidden_RD.split(step), labels_R.split(step), weights_R.split(step), strict=True)
        # The logits of a piece are recomputed in the backward pass: those of all positions together would dominate memory.
        losses = [checkpoint(self._piece, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.stack(losses).sum()

    def _piece(self, hidden_RD: Tensor, labels_R: Tensor, weights_R: Tensor) -> Tensor:
        logits_RV = head_logits(self.model, hidden_RD).float()
        loss_R = nn.functional.cross_entropy(logits_RV, labels_R, reduction="none")
        return (loss_R * weights_R).sum()


@contextmanager
def _deterministic() -> Iterator[None]:
    """Sums in a fixed order where torch can do so; on CUDA a few operations cannot, of which it warns."""
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
