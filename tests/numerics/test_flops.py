"""Operation counts against the matrix products that really ran."""

import numpy as np
import pytest
import torch
from numerics_reference import build, ragged
from torch.utils._python_dispatch import TorchDispatchMode

from worker.influence import (
    EmbeddingOptions,
    GradientProjection,
    embed,
    embedding_flops,
    gradient_flops,
    measured_matmul_rate,
    per_sample_gradients,
)

EQUAL = ragged(*["." * 10 + "r" * 10] * 6)  # one length, so that padding adds nothing


class Products(TorchDispatchMode):
    """Adds up 2 M K N of every matrix product."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm"):
            self.total += 2 * args[0].numel() * args[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.total += 2 * args[1].numel() * args[2].shape[-1]
        return func(*args, **(kwargs or {}))


def counted(run, *, without):
    """Operations of `run` less those of a call without samples (checks of the model)."""
    totals = []
    for call in (run, without):
        with Products() as counter:
            call()
        totals.append(counter.total)
    return totals[0] - totals[1]


def test_gradient_count():
    model, projection = build("llama", torch.float32), GradientProjection(dim=48, directions=20)
    actual = counted(
        lambda: per_sample_gradients(model, EQUAL, projection=projection, token_budget=1000),
        without=lambda: per_sample_gradients(model, EQUAL.slice(0, 0), projection=projection, token_budget=1000),
    )
    count = gradient_flops(model, EQUAL, projection=projection)
    assert count.total - count.attention == pytest.approx(actual), "fused attention is no matrix product here"


@pytest.mark.parametrize("kind", ["jvp", "hidden", "rds"])
def test_embedding_count(kind):
    model, options = build("llama", torch.float32), EmbeddingOptions(kind=kind, blocks=2)
    actual = counted(
        lambda: embed(model, EQUAL, options=options, token_budget=1000),
        without=lambda: embed(model, EQUAL.slice(0, 0), options=options, token_budget=1000),
    )
    count = embedding_flops(model, EQUAL, options=options)
    attention = 2 * count.attention if kind == "jvp" else 0.0  # jvp runs the whole square, hidden runs fused attention
    assert count.linear + attention == pytest.approx(actual)


def test_matmul_rate_is_positive():
    assert np.isfinite(measured_matmul_rate(torch.float32, size=64, seconds=0.01))
    assert measured_matmul_rate(torch.float32, size=64, seconds=0.01) > 1e6
