"""Models to measure on, the clock, and the rate of the machine's matrix products."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from llama_shapes import LLAMA
from transformers import AutoModelForCausalLM, LlamaConfig

from worker.influence import Samples


def load(name: str, dtype: str, options: argparse.Namespace) -> Any:
    """The model of `--model`, or a random one of that shape, created on the device."""
    if name == "model":
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, dtype), use_safetensors=True
        ).to(options.device)
    else:
        torch.manual_seed(options.seed)
        with torch.device(options.device):
            config = LlamaConfig(**LLAMA[name], max_position_embeddings=8192)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval()


def clock_of(device: str) -> Callable[[], float]:
    if torch.device(device).type == "cuda":

        def clock() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return clock
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def matmul_rate(dtype: torch.dtype, options: argparse.Namespace, clock: Callable[[], float], seconds: float) -> float:
    """Operations per second of a square product, on the clock that the stages are timed with; the best of three or more."""
    size = options.matmul_size or (8192 if torch.device(options.device).type == "cuda" else 2048)
    a = torch.randn(size, size, device=options.device).to(dtype)
    out, taken = torch.empty_like(a), []
    while len(taken) < 3 or sum(taken) < seconds:
        start = clock()
        torch.mm(a, a, out=out)
        taken.append(clock() - start)
    return 2.0 * size**3 / min(taken)


def timed(
    run: Callable[[Samples], Any], samples: Samples, clock: Callable[[], float], device: str
) -> tuple[float, int | None]:
    """Seconds, and on an accelerator the peak memory in use."""
    has_peak = torch.device(device).type == "cuda"
    if has_peak:
        torch.cuda.reset_peak_memory_stats(device)
    start = clock()
    run(samples)
    spent = clock() - start
    return spent, torch.cuda.max_memory_allocated(device) if has_peak else None
