"""The supervisor's handle on its compute process."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.settings import Settings
from worker.errors import ComputeDied, KernelKilled

# What the process may see of the environment: no database, no broker, none of our secrets.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SSL_CERT_FILE")
_ENVIRONMENT_PREFIXES = ("LC_", "PYTHON", "HF_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "XDG_")
_HUB_CREDENTIALS = ("HF_TOKEN", "HF_TOKEN_PATH", "HF_OIDC_RESOURCE")
_NETWORK_PREFIXES = ("HTTP_", "HTTPS_", "NO_PROXY")


_LESS_MEMORY = (
    "If that does not help, lower max_length, landmarks.count or gradient.projection_dim, or use quantization."
)


class ComputeProcess:
    """A running compute process. Used by one thread, apart from its reader. `from_hub`: its model comes from the hub.

    `module`: its main, if it is another one that speaks as `worker.process.main` does.
    """

    def __init__(self, settings: Settings, *, from_hub: bool = False, module: str = "worker.process.main") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(settings.artifacts.url, from_hub),
            start_new_session=True,  # Ctrl-C in the terminal is for the supervisor to handle
        )
        self._oom_kills = _oom_kills()
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="compute-reader", daemon=True).start()
        self.send(
            type="start",
            artifacts=settings.artifacts.url,
            models=str(settings.models.folder),
            worker=settings.worker.model_dump(mode="json"),
            log=settings.log.model_dump(mode="json"),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def death(self) -> str | None:
        """What it ended by: `exit` or the name of a signal; None while it lives."""
        code = self._process.poll()
        if code is None:
            return None
        return signal.Signals(-code).name if code < 0 else "exit"

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if line.endswith("\n"):  # else it was killed while it wrote
                    self._messages.put(json.loads(line))
        self._messages.put(None)

    def send(self, **message: Any) -> None:
        """Writes a message; a process that is gone shows in `receive`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message, or None after `timeout` seconds without one.

        Raises:
            ComputeDied: the process is gone; says why.
        """
        try:
            message = self._messages.get(timeout=timeout)
        except queue.Empty:
            return None
        if message is None:
            raise self._death()
        return message

    def _death(self) -> ComputeDied:
        code = self._process.wait()
        if code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
            return KernelKilled(f"The kernel killed the compute process: out of memory. {_LESS_MEMORY}")
        return ComputeDied(_cause(code))

    def close(self, grace_seconds: float) -> None:
        """Ends the process: its stdin closes, then SIGTERM, then SIGKILL."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        for signal_number in (None, signal.SIGTERM, signal.SIGKILL):
            if signal_number is not None:
                self._process.send_signal(signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=grace_seconds)
                return

    def stop(self, grace_seconds: float) -> None:
        """Ends a process that ignored a cancel: SIGTERM, then SIGKILL."""
        self._process.terminate()
        self.close(grace_seconds)


def _environment(store: str, from_hub: bool) -> dict[str, str]:
    """Credentials only for what the process has to reach: the hub's for a model from the hub, those of AWS for a store on S3."""
    prefixes: tuple[str, ...] = _ENVIRONMENT_PREFIXES
    if store.startswith(("s3://", "s3a://")):
        prefixes += ("AWS_",)
    if from_hub or "://" in store:
        prefixes += _NETWORK_PREFIXES
    kept = {n: v for n, v in os.environ.items() if n in _ENVIRONMENT or n.startswith(prefixes)}
    if from_hub:
        return kept
    return {name: value for name, value in kept.items() if name not in _HUB_CREDENTIALS} | {"HF_HUB_OFFLINE": "1"}


def _oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed for lack of memory: of our own memory group, or where that cannot be seen of this
    machine. With another group's a killed process of ours would look like one without memory, and get smaller batches."""
    for file in _oom_counters(root):
        with contextlib.suppress(OSError):
            counts = dict(line.split() for line in file.read_text().splitlines())
            if "oom_kill" in counts:
                return int(counts["oom_kill"])
    return 0


def _oom_counters(root: Path) -> Iterator[Path]:
    """Of cgroup 1 and 2; a container may see its own group as the topmost one."""
    v1, v2 = root / "sys/fs/cgroup/memory", root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if "memory" in controllers.split(","):
                yield v1 / group.lstrip("/") / "memory.oom_control"
                yield v1 / "memory.oom_control"
            elif not controllers:
                yield v2 / group.lstrip("/") / "memory.events"
    yield v2 / "memory.events"
    yield root / "proc/vmstat"


def _cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "The compute process was killed (signal 9), by a person or for lack of memory. If it is killed again, its batches"
            f" are halved. {_LESS_MEMORY}"
        )
    if code < 0:
        return f"The compute process died of signal {-code} ({signal.Signals(-code).name})."
    return f"The compute process exited with status {code}; see its log."
