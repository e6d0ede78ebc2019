"""Warm-up: trains the job's model on a random part of the pool; leaves a checkpoint and the state of the optimiser (METHOD 7)."""

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.duplicates.exclusions import taking_part
from worker.influence import Samples, save_state, state_of
from worker.loading.adapters import add_lora, save_checkpoint, trainable
from worker.stages import optimizer as job_optimizer
from worker.stages.context import StageContext
from worker.text import token_files
from worker.training import Training, train

_EVENT_SECONDS = 2.0
_POINTS = 200


def run(context: StageContext, artifact_key: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Writes what was trained, float32, under the unit's key, and the optimiser's state beside it.

    The whole model is trained in float32, whatever the dtype that it is measured in; adapters in float32 too, on a base of the
    job's own dtype. Of a model that is an adapter already, the adapter is trained.

    Raises:
        ModelError, ParameterError, OutOfMemory: the model cannot be trained; says why.
    """
    parameters = context.job.parameters
    options, seed = parameters["warmup"], parameters["seed"]
    samples = _drawn(context, spec["tokens"], options["samples"], seed)
    is_adapter = options["lora"] is not None or context.prepared["is_adapter"]
    model = context.model_to_train(context.prepared["dtype"] if is_adapter else "float32")
    added = None if options["lora"] is None else add_lora(model, options["lora"], seed)
    parameters_by_name = trainable(model)
    training = Training(
        epochs=options["epochs"],
        learning_rate=options["learning_rate"],
        batch_size=options["batch_size"],
        optimizer=job_optimizer.options(parameters),
        seed=seed,
        token_budget=context.token_budget,
    )
    optimizer, losses = train(
        model,
        parameters_by_name,
        samples,
        training,
        report=_Events(context),
        progress=lambda done, _: context.report(done),
    )
    state_key = f"{artifact_key.removesuffix('.safetensors')}.optimizer.safetensors"
    with context.store.writing(state_key) as path:
        save_state(state_of(optimizer, model), path)
    with context.store.writing(artifact_key) as path:
        save_checkpoint(model, path, added)
    return {
        "checkpoint": artifact_key,
        "optimizer_state": state_key,
        "adapter": is_adapter,
        "samples": len(samples),
        "tokens": int(samples.input_ids.size) * options["epochs"],
        "steps": len(losses),
        "trained_parameters": sum(p.numel() for p in parameters_by_name.values()),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "losses": [float(part.mean()) for part in np.array_split(losses, min(_POINTS, len(losses)))],
    }


def _drawn(context: StageContext, tokens: str, count: int, seed: int) -> Samples:
    """`count` of the samples that take part, by the seed; all of them where there are no more."""
    usable: npt.NDArray[np.int64] = np.flatnonzero(taking_part(context.store, context.prepared))
    chosen = np.random.default_rng([seed, 0x3A0]).choice(usable, size=min(count, usable.size), replace=False)
    return token_files.read_rows(context.store, tokens, np.sort(chosen))


class _Events:
    """Reports a step every few seconds, and the last one; `losses` are those of all steps since the event before."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self._last = -_EVENT_SECONDS
        self._losses: list[float] = []

    def __call__(self, step: int, steps: int, loss: float, rate: float) -> None:
        now = time.monotonic()
        self._losses.append(loss)
        if step < steps and now - self._last < _EVENT_SECONDS:
            return
        self._last = now
        data = {"step": step, "steps": steps, "loss": loss, "losses": self._losses, "learning_rate": rate}
        self._context.event("warmup.step", data)
        self._losses = []
