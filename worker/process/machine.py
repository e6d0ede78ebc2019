"""What the compute process may use of this machine, and what the machine can do."""

import os
import resource
import time
from typing import Any

import torch

from service.settings import WorkerSettings
from worker.loading.placement import choose_device, device_name
from worker.process.memory import available_memory, hold_to, usual_limit


def capability(device: torch.device) -> dict[str, Any]:
    """For the estimate of a job's time: the device, its memory, and its measured rate of matrix products."""
    largest = 1024 if device.type == "cpu" else 8192
    rates = {
        str(dtype).removeprefix("torch."): matmul_rate(dtype, device, largest=largest, seconds=0.1)
        for dtype in (torch.float32, torch.bfloat16)
    }
    is_cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if is_cuda else available_memory()
    return {"device": device_name(device), "memory_bytes": memory, "matmul_rates": rates}


def matmul_rate(dtype: torch.dtype, device: torch.device, *, largest: int, seconds: float) -> float:
    """Operations a second of a square matrix product: the fastest of three, as large as takes about `seconds`, up to `largest`.

    A processor without bfloat16 takes hundreds of times as long for it, and each start of a worker waits for this.
    """
    size = 64
    while size < largest and 3 * 8 * fastest_product(size, dtype, device) < seconds:
        size *= 2
    return 2 * size**3 / fastest_product(size, dtype, device)


def fastest_product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """The seconds of the fastest of three products of two square matrices."""
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def repeat_bits(device: torch.device) -> None:
    """Has CUDA add in a fixed order where torch can do so, so that embeddings and losses are the same bits in every run, as they
    are on a processor. Call it before the first product: cuBLAS reads its setting then.

    What cannot warns: the derivative of fused attention adds in the order in which its parts end.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads what was not written. torch's module is of a class that has this as a property.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def limit_memory(settings: WorkerSettings) -> None:
    """Holds this process to its limit. With CUDA there is none unless it is set: the driver sets aside far more than it uses,
    by no rule that is written down."""
    limit = settings.memory_bytes
    if limit == 0 and choose_device(settings.device).type == "cpu":
        limit = usual_limit()
    hold_to(limit)


def memory_limit() -> str:
    """The limit in a sentence."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return "The compute process has no memory limit."
    return f"The compute process is limited to {limit / 2**30:.1f} GiB (WINNOW_WORKER__MEMORY_BYTES)."
