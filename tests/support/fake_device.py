"""A device that is not there: tensors have a shape, a dtype and a device, but no values, so that what mixes devices is seen on a
machine without an accelerator."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

_SMALL = 1e-4  # positive, and below every tolerance


def _numpy(tensor: Tensor, *, force: bool = False) -> np.ndarray:
    if tensor.device.type != "cpu" and not force:
        raise TypeError(f"numpy() of a tensor on {tensor.device}")
    return np.zeros(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


_ANSWERS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.allclose: lambda *_, **__: True,
    torch.nonzero: lambda tensor: torch.zeros(0, tensor.ndim, dtype=torch.int64, device=tensor.device),
    Tensor.tolist: lambda _: [],
    Tensor.numpy: _numpy,
    Tensor.__bool__: lambda _: True,
    Tensor.__float__: lambda _: _SMALL,
    Tensor.__int__: lambda _: 0,
    Tensor.item: lambda _: _SMALL,
}
"""What asks for values, all of which are right: tests are passed, and nothing is not finite."""


class _WithoutValues(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _ANSWERS.get(function, function)(*args, **(kwargs or {}))


@contextmanager
def fake_device() -> Iterator[None]:
    """All tensors that are made inside are fake: on `cpu`; on `meta`, which stands for any accelerator and has derivatives in
    reverse mode; and on `cuda`, with a CUDA build of torch only, where the backward pass would need the device itself."""
    with FakeTensorMode(allow_non_fake_inputs=True), _WithoutValues():
        yield


def put_on(device: str, make: Callable[[], nn.Module]) -> Any:
    """The model that `make` returns, without its values and on the device. `Module.to` cannot swap fake parameters."""
    with unset_fake_temporarily(), torch._C.DisableTorchFunction():
        model = make()
    moved: dict[Tensor, Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None and value not in moved:
                    empty = torch.zeros(tuple(value.shape), dtype=value.dtype, device=device)
                    moved[value] = nn.Parameter(empty) if isinstance(value, nn.Parameter) else empty
                held[name] = None if value is None else moved[value]
    return model
