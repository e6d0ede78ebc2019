"""How a model's weights are loaded and where they go: data type or quantisation, one device or several GPUs."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import BitsAndBytesConfig

from worker.errors import DeviceNotHere, ParameterError
from worker.influence.causal_lm import parameter_dtype

_BYTES: Mapping[str, float] = {"int8": 1.0, "nf4": 0.5}
_SHARE = 0.8
"""Of a GPU's free memory, what weights may take; the rest is for activations."""


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        DeviceNotHere: CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceNotHere("A worker's WINNOW_WORKER__DEVICE is cuda, but torch sees no CUDA device there.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it natively (Ampere and later, AVX512-BF16 or AMX), else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def quantised(name: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How transformers quantises while it loads; None for `none`. `dtype` is that of the products of 4-bit layers.

    Raises:
        ParameterError: bitsandbytes is not installed.
    """
    if name == "none":
        return None
    if find_spec("bitsandbytes") is None:
        raise ParameterError(
            f"quantization {name} needs bitsandbytes, which this worker lacks: install winnow-select[quantised] on the workers,"
            " or omit quantization."
        )
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_derivative(model: nn.Module) -> None:
    """Makes sure that output gradients pass through the quantised layers to their inputs.

    On a processor, bitsandbytes repacks 4-bit weights at the first pass without gradients, for products that have no derivative:
    gradients would then be silently wrong. That is switched off here, and one layer is tried.

    Raises:
        ParameterError: they do not.
    """
    layers = [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    layer = next(module for module in layers if isinstance(module, nn.Linear))
    x_BI = torch.ones(2, layer.in_features, dtype=parameter_dtype(model), device=layer.weight.device)
    with torch.no_grad():
        layer(x_BI)
    (gradient,) = torch.autograd.grad(layer(x_BI.requires_grad_()).sum(), x_BI, allow_unused=True)
    if gradient is None or not gradient.any():
        raise ParameterError(
            "This worker's bitsandbytes does not support derivatives of quantised layers on its device; use another quantization."
        )


def weight_bytes(files: Iterable[Path], dtype: torch.dtype, quantization: str) -> int:
    """Bytes that the weights of safetensors files take once loaded; reads the headers only.

    If quantised, all matrices are counted at the smaller size: a little too low, since embeddings and head are not quantised.
    """
    total = 0.0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                shape = file.get_slice(name).get_shape()
                size = _BYTES.get(quantization, dtype.itemsize) if len(shape) == 2 else dtype.itemsize
                total += prod(shape) * size
    return int(total)


def free_memory(device: torch.device) -> list[int]:
    """Free bytes of every CUDA device; empty on a processor."""
    if device.type != "cuda":
        return []
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def share_out(needed: int, free: Sequence[int]) -> dict[int, int] | None:
    """The most bytes that weights may take of each GPU, if one GPU is too small for all `needed` bytes and there are more.

    None: all of them go to one device.

    Raises:
        ParameterError: they do not fit all of the GPUs together.
    """
    if len(free) < 2 or needed <= _SHARE * free[0]:
        return None
    most = {index: int(_SHARE * size) for index, size in enumerate(free)}
    if needed > sum(most.values()):
        raise ParameterError(
            f"The model's weights take {needed / 2**30:.1f} GiB, and this worker's {len(free)} GPUs have space for"
            f" {sum(most.values()) / 2**30:.1f} GiB: use dtype bfloat16, or quantization int8 or nf4."
        )
    return most


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
