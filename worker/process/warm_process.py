"""The compute process that a worker keeps from unit to unit, with the model that it has loaded."""

import time
from collections.abc import Mapping
from typing import Any

from service.settings import Settings
from service.storage.artifacts import ArtifactStore
from worker.errors import ComputeDied, DeviceNotHere
from worker.metrics import WorkerMetrics
from worker.process.compute_process import ComputeProcess

POLL_SECONDS = 0.25


class WarmProcess:
    """At most one process at a time, started when it is needed."""

    def __init__(self, settings: Settings, store: ArtifactStore, metrics: WorkerMetrics) -> None:
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self._model: Mapping[str, Any] | None = None
        self.current: ComputeProcess | None = None

    def holding(self, model: Mapping[str, Any]) -> ComputeProcess:
        """The running process, or a new one if there is none or it has loaded another model."""
        if self.current is not None and (not self.current.is_alive or self._model != model):
            self._metrics.child_ended(self.current.death or "other_model")
            self.close()
        if self.current is None:
            from_hub = "hub" in (model["kind"], model.get("base", model)["kind"])
            self.current, self._model = ComputeProcess(self._settings, from_hub=from_hub), model
            self._metrics.child_starts.inc()
        return self.current

    def probe(self) -> None:
        """Starts a process and ends it, as a proof that it finds its device.

        Raises:
            DeviceNotHere: it does not, or does not start.
        """
        process = ComputeProcess(self._settings)
        deadline = time.monotonic() + self._settings.worker.stall_seconds
        try:
            while time.monotonic() < deadline:
                message = process.receive(POLL_SECONDS)
                if message is not None and message["type"] == "ready":
                    return
                if message is not None and message["type"] == "failed":
                    raise DeviceNotHere(message["error"]["detail"])
        except ComputeDied as error:
            raise DeviceNotHere(f"A worker's compute process does not start. {error.detail}") from error
        finally:
            process.close(self._settings.worker.cancel_grace_seconds)
        raise DeviceNotHere("A worker's compute process does not become ready.")

    def interrupt(self) -> None:
        """Stops the process at its next batch and keeps it; ends it if it ignores that."""
        if self.current is None:
            return
        self.current.send(type="cancel")
        deadline = time.monotonic() + self._settings.worker.cancel_grace_seconds
        try:
            while time.monotonic() < deadline:
                message = self.current.receive(POLL_SECONDS)
                if message is not None and message["type"] in ("done", "failed", "cancelled"):
                    return
        except ComputeDied:
            pass
        self.drop()

    def drop(self) -> None:
        """Ends the process, whatever it is doing."""
        if self.current is not None:
            self._metrics.child_ended(self.current.death or "stopped")
            self.current.stop(self._settings.worker.cancel_grace_seconds)
            self.current = None
            self._store.remove_abandoned()  # what it was writing

    def close(self) -> None:
        if self.current is not None:
            self.current.close(self._settings.worker.cancel_grace_seconds)
            self.current = None
