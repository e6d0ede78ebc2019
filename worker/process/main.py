"""The compute process: runs units one after the other, requested by JSON lines on stdin, answered by JSON lines on stdout.

A fresh process without database credentials: it sees the artifact store, the models and nothing else. It ends when its
stdin closes, so it never outlives its supervisor, whatever killed that.

    <- {"type": "start", "artifacts": url, "models": folder, "worker": {...}, "log": {...}}
    <- {"type": "run", "stage": ..., "artifact_key": ..., "spec": ..., "job": ..., "prepared": ..., "halvings": 0,
        "log": {"job_id": ..., ...}}             fields of every line that is logged meanwhile
    -> {"type": "ready", "device": ..., "memory_bytes": ..., "matmul_rates": {"float32": 9.7e10, ...}}     once
    -> {"type": "alive"}                          every few seconds: also in a long batch, not when it is stopped or deadlocked
    -> {"type": "progress", "done": 128}          any number of times
    -> {"type": "event", "kind": "warmup.step", "data": {...}}       any number of times
    -> {"type": "done", "result": ...} | {"type": "failed", "error": ..., "retryable": ...} | {"type": "cancelled"}
        `failed` in the place of `ready`: its device is not there, and it ends
    <- {"type": "cancel"}                         seen at the next batch
"""

import errno
import logging
import os
import re
import resource
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from service.observability import logs
from service.plan.limits import default_token_budget
from service.plan.stages import JobInputs, Stage
from service.settings import LogSettings, WorkerSettings
from service.storage.artifacts import ArtifactStore
from service.storage.checksums import ArtifactDamaged
from worker.artifact_cache import record_result
from worker.errors import Cancelled, DeviceNotHere, OutOfMemory, ParameterError, StorageFull, UnitError, of_the_store
from worker.influence import UnusableInput
from worker.loading.placement import choose_device
from worker.process import machine
from worker.process.conversation import Conversation
from worker.stages import curvature, embed, gradients, prepare, propagate, select, select_embedding, validate, warmup
from worker.stages.context import ModelCache, StageContext

log = logging.getLogger(__name__)

Event = Callable[[str, dict[str, Any]], None]


class Compute:
    """Everything that stays between units: the store, the settings and the loaded model."""

    def __init__(self, *, artifacts: str, models: Path, settings: WorkerSettings) -> None:
        # Every batch has another shape. torch keeps up to 1,024 compiled products by shape, with their buffers:
        # gigabytes after an hour. Keeping one bounds the memory and costs no time (docs/decisions/0005-memory.md).
        os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
        device = choose_device(settings.device)
        machine.repeat_bits(device)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.store = ArtifactStore(artifacts)
        self.models = ModelCache(models, device)

    def run(self, unit: Mapping[str, Any], report: Callable[[int], None], event: Event) -> dict[str, Any]:
        """Does one unit and returns its result. `report` gets the number of samples done, `event` what else happens.

        Raises:
            UnitError: the attempt failed.
            Cancelled: raised by `report`.
        """
        budget = self.settings.token_budget or default_token_budget(self.models.device.type)
        context = StageContext(
            store=self.store,
            job=JobInputs(**unit["job"]),
            prepared=unit["prepared"],
            models=self.models,
            settings=self.settings,
            token_budget=max(1, budget >> unit["halvings"]),
            report=report,
            event=event,
        )
        self.store.on_damage = lambda key, reason: event("artifact.damaged", {"artifact": key, "reason": reason})
        started = time.perf_counter()
        try:
            with self.models.checking():
                result = self._stage(context, unit)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            result |= {"seconds": round(time.perf_counter() - started, 3), "peak_memory_bytes": peak}
            result = record_result(self.store, unit["artifact_key"], result)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(f"{str(error) or 'The memory is used up'}. {machine.memory_limit()}") from error
        except ArtifactDamaged as error:
            raise of_the_store(error) from error
        except (OSError, SafetensorError) as error:
            if (known := _of_storage(error)) is None:
                raise
            raise known from error
        except UnusableInput as error:
            raise ParameterError(str(error)) from error
        return result

    def _stage(self, context: StageContext, unit: Mapping[str, Any]) -> dict[str, Any]:
        key, spec, job = unit["artifact_key"], unit["spec"], context.job
        match Stage(unit["stage"]):
            case Stage.PREPARE:
                return prepare.run(context, key, spec)
            case Stage.WARMUP:
                return warmup.run(context, key, spec)
            case Stage.TARGET_GRADIENTS:
                return gradients.run(context, key, spec, dataset=job.target)
            case Stage.LANDMARK_GRADIENTS | Stage.REFINE:
                return gradients.run(context, key, spec, dataset=job.pool)
            case Stage.EMBED_TARGET:
                return embed.run(context, key, spec, dataset=job.target)
            case Stage.EMBED | Stage.CANDIDATES:
                return embed.run(context, key, spec, dataset=job.pool)
            case Stage.CHOOSE_EMBEDDING:
                return select_embedding.run(context, spec)
            case Stage.CURVATURE:
                return curvature.run(context, key, spec)
            case Stage.PROPAGATE:
                return propagate.run(context, key, spec)
            case Stage.SELECT:
                return select.run(context, key, spec)
            case Stage.VALIDATE:
                return validate.run(context, spec)


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """torch has an exception for a GPU's memory only; for the CPU's it raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _of_storage(error: OSError | SafetensorError) -> UnitError | None:
    """What the operator has to fix; None for a bug of ours."""
    if isinstance(error, SafetensorError):  # it keeps only the text of the system's error
        code = re.search(r"\(os error (\d+)\)", str(error))
        error = OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{error.strerror}: {error.filename or 'the artifact store'}. Free or add space.")
    if isinstance(error, FileNotFoundError):
        return of_the_store(error)
    return None


def _answer(compute: Compute, unit: Mapping[str, Any], conversation: Conversation) -> None:
    try:
        conversation.send(type="done", result=compute.run(unit, conversation.report, conversation.event))
    except Cancelled:
        conversation.send(type="cancelled")
    except UnitError as error:
        conversation.send(type="failed", error=error.as_dict(), retryable=error.retryable)
    except Exception as error:
        log.exception("the %s unit failed", unit["stage"])
        where = traceback.extract_tb(error.__traceback__)[-1]
        detail = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        conversation.send(type="failed", error={"code": "internal_error", "detail": detail}, retryable=True)


def main() -> None:
    transformers_logging.disable_progress_bar()
    conversation = Conversation.of_this_process()
    start = conversation.messages.get()
    logs.configure(LogSettings(**start["log"]), service="compute")
    settings = WorkerSettings(**start["worker"])
    try:
        machine.limit_memory(settings)
        compute = Compute(artifacts=start["artifacts"], models=Path(start["models"]), settings=settings)
    except DeviceNotHere as error:
        conversation.send(type="failed", error=error.as_dict(), retryable=error.retryable)
        return
    conversation.send(type="ready", **machine.capability(compute.models.device))
    while True:
        unit = conversation.messages.get()
        with logs.bound(**unit.get("log", {})):
            _answer(compute, unit, conversation)


if __name__ == "__main__":
    main()
