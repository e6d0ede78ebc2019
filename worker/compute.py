"""The compute child: does units one after the other, told by JSON lines on stdin, answering by JSON lines on stdout.

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
    <- {"type": "cancel"}                         seen at the next batch
"""

import contextlib
import errno
import json
import logging
import os
import queue
import re
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from service.artifacts import ArtifactStore
from service.jobs.state import Stage
from service.observability import logs
from service.settings import LogSettings, WorkerSettings
from worker.errors import ArtifactMissing, Cancelled, OutOfMemory, ParameterError, StorageFull, UnitError
from worker.influence import default_token_budget, measured_matmul_rate
from worker.models import choose_device
from worker.stages import choose, curvature, embed, gradients, prepare, propagate, select, validate, warmup
from worker.stages.context import ModelCache, StageContext
from worker.stages.keys import result_key
from worker.stages.plan import JobInputs

log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.2
_ALIVE_SECONDS = 2.0

Event = Callable[[str, dict[str, Any]], None]


class Compute:
    """Everything that stays between units: the store, the settings and the loaded model."""

    def __init__(self, *, artifacts: str, models: Path, settings: WorkerSettings) -> None:
        # Every batch has a shape of its own. torch keeps up to 1,024 compiled products by shape, with their buffers:
        # gigabytes after an hour. Keeping one bounds the memory and costs no time (docs/decisions/0005-memory.md).
        os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
        device = choose_device(settings.device)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.store = ArtifactStore(artifacts)
        self.models = ModelCache(models, device)

    def capability(self) -> dict[str, Any]:
        """What this worker can do, for the estimate of a job's time: its memory, and its measured rate of matrix products."""
        device = self.models.device
        size = 1024 if device.type == "cpu" else 8192
        rates = {
            str(dtype).removeprefix("torch."): measured_matmul_rate(dtype, device, size=size, seconds=0.1)
            for dtype in (torch.float32, torch.bfloat16)
        }
        is_cuda = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory if is_cuda else _available_memory()
        return {"device": prepare.device_name(device), "memory_bytes": memory, "matmul_rates": rates}

    def run(self, unit: Mapping[str, Any], report: Callable[[int], None], event: Event) -> dict[str, Any]:
        """Does one unit and returns its result. `report` is told how many samples are done, `event` what else happens.

        Raises:
            UnitError: the attempt failed.
            Cancelled: `report` said so.
        """
        budget = self.settings.token_budget or default_token_budget(self.models.device)
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
        started = time.perf_counter()
        try:
            result = self._stage(context, unit)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            result |= {"seconds": round(time.perf_counter() - started, 3), "peak_memory_bytes": peak}
            self.store.write_json(result_key(unit["artifact_key"]), result)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise OutOfMemory(f"{str(error) or 'The memory is used up'}. {_told_limit()}") from error
        except (OSError, SafetensorError) as error:
            if (known := _of_storage(error)) is None:
                raise
            raise known from error
        except ValueError as error:  # the numerical core's word for arguments that do not fit together
            raise ParameterError(str(error)) from error
        return result

    def _stage(self, context: StageContext, unit: Mapping[str, Any]) -> dict[str, Any]:
        key, spec, job = unit["artifact_key"], unit["spec"], context.job
        match Stage(unit["stage"]):
            case Stage.PREPARE:
                return prepare.run(context)
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
                return choose.run(context, spec)
            case Stage.CURVATURE:
                return curvature.run(context, key, spec)
            case Stage.PROPAGATE:
                return propagate.run(context, key, spec)
            case Stage.SELECT:
                return select.run(context, key, spec)
            case Stage.VALIDATE:
                return validate.run(context, spec)
            case stage:
                raise RuntimeError(f"{stage} is not computed by the child")


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """torch has a class of its own for a GPU's memory only; of a processor's it raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _of_storage(error: OSError | SafetensorError) -> UnitError | None:
    """What the operator has to see to, told apart from a fault of ours, which is None."""
    if isinstance(error, SafetensorError):  # of the system's error it keeps the words
        told = re.search(r"\(os error (\d+)\)", str(error))
        error = OSError(int(told[1]), os.strerror(int(told[1]))) if told else OSError(str(error))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{error.strerror}: {error.filename or 'the artifact store'}. Free some room, or add to it.")
    if isinstance(error, FileNotFoundError):
        return ArtifactMissing.named(error)
    return None


def _limit_memory(settings: WorkerSettings) -> None:
    """From the limit on an allocation fails, which ends the attempt; without one the kernel kills, the child before any other.

    With CUDA there is none unless it is set: the driver sets aside far more than it uses, by no rule that is written down.
    """
    limit = settings.memory_bytes
    if limit == 0 and choose_device(settings.device).type == "cpu":
        limit = _available_memory() * 9 // 10  # the rest is for the supervisor and what the kernel keeps
    if limit > 0:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with contextlib.suppress(OSError):  # not on Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text("500")


def _told_limit() -> str:
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return "The compute process has no limit on its memory."
    return f"The compute process may have {limit / 2**30:.1f} GiB (WINNOW_WORKER__MEMORY_BYTES)."


def _available_memory() -> int:
    """Of the machine, or of the container where that has less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            found.append(int(Path(file).read_text()))
    return min(found)


class _Conversation:
    """The child's side of the pipe. A thread reads, so that a cancel and the end of the supervisor are seen while computing."""

    def __init__(self, incoming: IO[str], outgoing: IO[str]) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._last_progress = 0.0
        self.cancelled = threading.Event()
        self.messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._sending = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._pulse, daemon=True).start()

    def _read(self) -> None:
        for line in self._incoming:
            message = json.loads(line)
            if message["type"] == "cancel":
                self.cancelled.set()
                continue
            self.cancelled.clear()  # here, in the order of the messages: a cancel that follows its unit closely counts
            self.messages.put(message)
        os._exit(0)  # the supervisor is gone: nobody would read a result

    def _pulse(self) -> None:
        while True:
            time.sleep(_ALIVE_SECONDS)
            self.send(type="alive")

    def send(self, **message: Any) -> None:
        with self._sending:
            self._outgoing.write(json.dumps(message) + "\n")
            self._outgoing.flush()

    def event(self, kind: str, data: dict[str, Any]) -> None:
        self.send(type="event", kind=kind, data=data)

    def report(self, done: int) -> None:
        if self.cancelled.is_set():
            raise Cancelled
        now = time.monotonic()
        if now - self._last_progress >= _PROGRESS_SECONDS:
            self._last_progress = now
            self.send(type="progress", done=done)


def _answer(compute: Compute, unit: Mapping[str, Any], conversation: _Conversation) -> None:
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
    # The pipe keeps a descriptor of its own; whatever a library prints goes to stderr.
    outgoing = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    conversation = _Conversation(sys.stdin, outgoing)
    start = conversation.messages.get()
    logs.configure(LogSettings(**start["log"]), service="compute")
    settings = WorkerSettings(**start["worker"])
    _limit_memory(settings)
    compute = Compute(artifacts=start["artifacts"], models=Path(start["models"]), settings=settings)
    conversation.send(type="ready", **compute.capability())
    while True:
        unit = conversation.messages.get()
        with logs.bound(**unit.get("log", {})):
            _answer(compute, unit, conversation)


if __name__ == "__main__":
    main()
