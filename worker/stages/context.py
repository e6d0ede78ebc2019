"""What a stage is given: the store, the job, ways to report progress and events, and the model, loaded once and kept."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from service.plan.stages import JobInputs
from service.settings import WorkerSettings
from service.storage.artifacts import ArtifactStore
from worker.errors import ModelNotHere
from worker.loading import adapters, folders, models

_Loaded = tuple[tuple[Any, ...], PreTrainedModel]


@dataclass(slots=True)
class ModelCache:
    """The model, and the tokenizer, that the process keeps between units: one at a time."""

    registered: Path
    device: torch.device
    _folders: dict[str, folders.ModelFolder] = field(default_factory=dict)
    _tokenizer: tuple[str, PreTrainedTokenizerBase] | None = None
    _loaded: _Loaded | None = None
    _used: tuple[Mapping[str, Any], str] | None = None

    def folder(self, model: Mapping[str, Any]) -> folders.ModelFolder:
        """The model's files, rehashed only when they changed: an operator may replace a registered model."""
        name = repr(sorted(model.items()))
        if name not in self._folders or not self._folders[name].is_current:
            self._folders[name] = folders.find(model, self.registered)
        return self._folders[name]

    def tokenizer(self, model: Mapping[str, Any], fingerprint: str) -> PreTrainedTokenizerBase:
        """The model's tokenizer, if its files are still those of the fingerprint.

        Raises:
            ModelNotHere: here are other files.
            ModelError: it cannot be loaded.
        """
        folder = self.unchanged(model, fingerprint)
        if self._tokenizer is None or self._tokenizer[0] != folder.tokenizer_fingerprint:
            loaded = models.load_tokenizer(folder)
            self.unchanged(model, fingerprint)  # since it was hashed
            self._tokenizer = folder.tokenizer_fingerprint, loaded
        return self._tokenizer[1]

    def load(
        self,
        model: Mapping[str, Any],
        fingerprint: str,
        dtype: torch.dtype,
        *,
        checkpoint: tuple[ArtifactStore, str] | None = None,
        quantization: str = "none",
    ) -> PreTrainedModel:
        """The model, if its files are still those that the job was prepared with; on top of it the warm-up's checkpoint.

        Raises:
            ModelNotHere: here are other files than those that the job was prepared with.
            ModelError: they cannot be loaded.
            ParameterError: the model cannot be quantised here, or is too large for this machine.
        """
        folder = self.unchanged(model, fingerprint)
        self._used = model, fingerprint
        wanted = (fingerprint, dtype, quantization, checkpoint and checkpoint[1])
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None  # the old model goes before the new one comes
            loaded = models.load_model(folder, dtype, self.device, quantization)
            self.unchanged(model, fingerprint)  # since it was hashed
            if checkpoint is not None:
                with checkpoint[0].local(checkpoint[1]) as path:
                    adapters.load_checkpoint(loaded, path)
            self._loaded = (wanted, loaded)
        return self._loaded[1]

    def unchanged(self, model: Mapping[str, Any], fingerprint: str) -> folders.ModelFolder:
        """The model's files, if they are those of the fingerprint.

        Raises:
            ModelNotHere: they changed since, or are not those that the job began with.
        """
        folder = self.folder(model)
        if folder.fingerprint != fingerprint:
            self._loaded = None
            raise ModelNotHere(
                "A worker's files of the model changed while the job was running, or are not those it began with."
            )
        return folder

    @contextmanager
    def checking(self) -> Iterator[None]:
        """What is done here counts only if the files of a model that it used are unchanged at its end: weights are mapped from
        them, and may be read late.

        Raises:
            ModelNotHere: they changed meanwhile.
        """
        self._used = None
        yield
        if self._used is not None:
            self.unchanged(*self._used)

    def forget(self) -> None:
        """Stops keeping the model: the caller is about to change it."""
        self._loaded = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """`report(done)` counts samples of the unit and raises Cancelled when the unit is to stop; `event(kind, data)` records
    an event of the job, with data that JSON can hold."""

    store: ArtifactStore
    job: JobInputs
    prepared: Mapping[str, Any]
    models: ModelCache
    settings: WorkerSettings
    token_budget: int
    report: Callable[[int], None]
    event: Callable[[str, dict[str, Any]], None]

    def model(self, checkpoint: str | None = None, dtype: str | None = None) -> PreTrainedModel:
        """The job's model, on which influence is measured; `checkpoint` is the key of what its warm-up left. `dtype` is the
        job's where none is named.

        Raises:
            ModelError, ParameterError: it cannot be loaded; says why.
        """
        return self._load(dtype or self.prepared["dtype"], None if checkpoint is None else (self.store, checkpoint))

    def model_to_train(self, dtype: str) -> PreTrainedModel:
        """The job's model for the caller alone, who may change it."""
        model = self._load(dtype, None)
        self.models.forget()
        return model

    def _load(self, dtype: str, checkpoint: tuple[ArtifactStore, str] | None) -> PreTrainedModel:
        return self.models.load(
            self.job.model,
            self.prepared["model_fingerprint"],
            {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype],
            checkpoint=checkpoint,
            quantization=self.job.parameters["quantization"],
        )
