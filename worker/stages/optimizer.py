"""The job's optimiser as the core knows it: its options, and its state from the warm-up or registered with the model."""

from collections.abc import Mapping
from typing import Any

from service.models.registry import OPTIMIZER_STATE
from worker.errors import ModelError
from worker.influence import OptimizerOptions, OptimizerState, load_state
from worker.stages.context import StageContext

REGISTERED = "registered"


def options(parameters: Mapping[str, Any]) -> OptimizerOptions:
    optimizer = parameters["optimizer"]
    return OptimizerOptions(
        type=optimizer["type"],
        learning_rate=optimizer["learning_rate"],
        betas=tuple(optimizer["betas"]),
        eps=optimizer["eps"],
        momentum=optimizer["momentum"],
        weight_decay=optimizer["weight_decay"],
    )


def state(context: StageContext, where: str | None) -> OptimizerState | None:
    """The state at `where`: an artifact, or `registered`; None for an optimiser that has none.

    Raises:
        ModelError: the model is registered without a state.
    """
    if where is None:
        return None
    if where != REGISTERED:
        with context.store.local(where) as path:
            return load_state(path)
    path = context.models.folder(context.job.model).path / OPTIMIZER_STATE
    if not path.is_file():
        raise ModelError(
            f"The model is registered without an optimiser state ({OPTIMIZER_STATE}); request a warmup instead."
        )
    return load_state(path)
