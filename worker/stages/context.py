"""What a stage is given: the store, the job, a way to tell of progress, and the model, loaded once and kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from service.artifacts import ArtifactStore
from service.settings import WorkerSettings
from worker import models
from worker.errors import ModelError
from worker.stages.plan import JobInputs


@dataclass(slots=True)
class ModelCache:
    """The model that the process keeps between units: one at a time."""

    registered: Path
    device: torch.device
    _folders: dict[str, models.ModelFolder] = field(default_factory=dict)
    _loaded: tuple[tuple[str, torch.dtype], PreTrainedModel] | None = None

    def folder(self, model: Mapping[str, Any]) -> models.ModelFolder:
        """The model's files, hashed again only where they changed: an operator may replace a registered model."""
        name = repr(sorted(model.items()))
        if name not in self._folders or not self._folders[name].is_current:
            self._folders[name] = models.find(model, self.registered)
        return self._folders[name]

    def load(self, model: Mapping[str, Any], fingerprint: str, dtype: torch.dtype) -> PreTrainedModel:
        """The model, if its files are still those that the job was prepared with.

        Raises:
            ModelError: the files changed since.
        """
        folder = self.folder(model)
        if folder.fingerprint != fingerprint:
            raise ModelError("The model's files changed while the job was running; post the job again.")
        if self._loaded is None or self._loaded[0] != (fingerprint, dtype):
            self._loaded = None  # the old model goes before the new one comes
            self._loaded = ((fingerprint, dtype), models.load_model(folder, dtype, self.device))
        return self._loaded[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """`report(done)` counts samples of the unit and raises Cancelled when the unit is to stop."""

    store: ArtifactStore
    job: JobInputs
    prepared: Mapping[str, Any]
    models: ModelCache
    settings: WorkerSettings
    token_budget: int
    report: Callable[[int], None]

    def model(self) -> PreTrainedModel:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.prepared["dtype"]]
        return self.models.load(self.job.model, self.prepared["model_fingerprint"], dtype)
