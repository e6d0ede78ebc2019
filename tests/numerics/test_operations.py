"""The plan's counts of operations against the matrix products that really run."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from support.numerics_reference import ragged
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from service.plan import operations
from service.plan.job_counts import JobCounts
from service.plan.operations import Shape, TokenCounts
from service.plan.parameters import Parameters
from service.plan.stage_costs import StageCosts
from service.plan.stages import Stage
from worker.influence import (
    EmbeddingOptions,
    GradientProjection,
    Samples,
    embed,
    per_sample_gradients,
)
from worker.influence.causal_lm import linear_layers
from worker.influence.second_order import second_order_terms
from worker.loading.model_shape import counts_of, shape_of
from worker.process import machine
from worker.process.machine import matmul_rate

EQUAL = ragged(*["." * 10 + "r" * 10] * 6)  # one length, so that padding adds nothing
PLAIN = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40},
    "gpt_neox": PLAIN,
    "llama": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8},
}


class Products(TorchDispatchMode):
    """Adds up the operations of every matrix product. (torch's own counter cannot look into second derivatives.)"""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self.total += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[Samples], object]) -> int:
    """Operations of `run` on the samples, after a call without samples, at which the model is checked."""
    run(EQUAL.slice(0, 0))
    with Products() as counter:
        run(EQUAL)
    return counter.total


def built(family: str) -> tuple[Any, Shape]:
    """A model, and its shape as the plan reads it from the configuration."""
    config = AutoConfig.for_model(
        family, vocab_size=61, bos_token_id=0, eos_token_id=1, pad_token_id=2, **SIZES[family]
    )
    shape = Shape.of_config(json.loads(config.to_json_string(use_diff=True)))
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION.get(family, "sdpa")), shape


@pytest.fixture(scope="module", params=list(SIZES))
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Shape]:
    return built(request.param)


ATTENTION = {"gemma2": "eager"}  # fused attention does not know its soft-capping


def uncounted(model: Any, shape: Shape, squares: float, passes: float) -> float:
    """Of the attention that is counted, half of the square: what fused kernels compute and no matrix product. Where products
    compute it, they compute the other half too, so that more was done than is counted."""
    half = 2 * squares * shape.attention_width * passes
    return -half if model.config._attn_implementation == "eager" else half


@pytest.mark.parametrize("dim", [None, 48, 10_000])
def test_gradients(loaded: tuple[Any, Shape], dim: int | None) -> None:
    model, shape = loaded
    projection = None if dim is None else GradientProjection(dim=dim)
    actual = counted(lambda s: per_sample_gradients(model, s, projection=projection, token_budget=1000))
    counts = counts_of(EQUAL)
    expected = operations.gradients(shape, counts, modules="down_proj", projection_dim=dim)
    passes = shape.blocks + 2 * (shape.blocks - 1)  # backward twice that, and not through the first block
    assert expected - uncounted(model, shape, counts.seen.squares, passes) == pytest.approx(actual)


@pytest.mark.parametrize("width", [24, 72, 144])
def test_the_embedding_by_the_output_layer(width: int) -> None:
    """Kept whole, projected on one side and on both."""
    sizes = {**GROUPED, "hidden_size": width}
    config = AutoConfig.for_model("llama", vocab_size=61, bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes)
    model, shape = AutoModelForCausalLM.from_config(config), Shape.of_config(config.to_dict())
    options = EmbeddingOptions(kind="output")
    actual = counted(lambda s: embed(model, s, options=options, token_budget=1000))
    counts = counts_of(EQUAL)
    fused = 2 * counts.seen.squares * shape.attention_width * shape.blocks
    assert operations.embedding(shape, counts, asdict(options)) - fused == pytest.approx(actual)
    assert embed(model, EQUAL, options=options).shape[1] == operations.embedding_width(shape, asdict(options))


@pytest.mark.parametrize("kind", ["jvp", "hidden", "rds"])
def test_embeddings(kind: Any) -> None:
    model, shape = built("llama")
    options = EmbeddingOptions(kind=kind, blocks=2)
    actual = counted(lambda s: embed(model, s, options=options, token_budget=1000))
    counts = counts_of(EQUAL)
    half = 2 * counts.squares * shape.attention_width * (shape.blocks if kind == "rds" else 2)
    # jvp computes the whole square in products, the others none of it.
    more = half * (1 + 2 * options.tangents) if kind == "jvp" else -half
    assert operations.embedding(shape, counts, asdict(options)) + more == pytest.approx(actual)


def test_a_loaded_model_has_the_shape_of_its_configuration(loaded: tuple[Any, Shape]) -> None:
    model, shape = loaded
    assert shape_of(model) == shape
    matrices = [p.numel() for name, p in model.base_model.named_parameters() if p.ndim == 2 and "wpe" not in name]
    assert shape.weights == sum(matrices)


@pytest.mark.parametrize("modules", ["all-linear", "attention", "mlp"])
def test_a_loaded_model_with_adapters_has_the_shape_that_the_plan_gives_it(modules: str) -> None:
    model, shape = built("llama")
    adapted = shape.with_adapters(3, modules)
    inject_adapter_in_model(LoraConfig(r=3, target_modules=[name.split(".")[1] for name in adapted.adapters]), model)
    assert shape_of(model) == adapted
    sizes = [size for _, size in adapted.measured("down_proj")]
    layers = linear_layers(model, "lora").values()
    assert sorted(sizes) == sorted((layer.out_features, layer.in_features) for layer in layers)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_second_order_terms_count_about_as_many_products_as_really_run(kind: Any) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=128, bos_token_id=0, eos_token_id=1, pad_token_id=2, **{**GROUPED, "num_hidden_layers": 6}
    )
    rank, dim, length = 8, 96, 24
    counts = {n: TokenCounts(n, n * length, n * length**2, n * length / 2) for n in (6, 12)}
    targets, landmarks = (
        Samples(
            input_ids=np.full(n * length, 5, dtype=np.int32),
            response=np.tile(np.arange(length) >= length // 2, n),
            offsets=np.arange(n + 1) * length,
        )
        for n in counts
    )
    with Products() as counter:
        second_order_terms(
            AutoModelForCausalLM.from_config(config),
            landmarks,
            [targets],
            kind=kind,
            coefficients=torch.randn(12, rank, dtype=torch.float64),
            scaling=None,
            offset=None,
            projection=GradientProjection(dim=dim),
        )
    given = Parameters(
        method="exact_influence",
        selection="weighted",
        optimizer={"type": "sgd"},
        curvature={"type": kind, "rank": rank},
        gradient={"projection_dim": dim},
    ).model_dump(mode="json")
    about = JobCounts(pool=counts[12], target=counts[6], budget=1, estimated=False)
    shape = Shape.of_config(config.to_dict())
    estimate = StageCosts(shape, given, about, "float32", 512).all()[Stage.CURVATURE].operations
    assert estimate == pytest.approx(counter.total, rel=0.25)


def test_matmul_rate_is_positive() -> None:
    rate = matmul_rate(torch.float32, torch.device("cpu"), largest=64, seconds=0.01)
    assert np.isfinite(rate)
    assert rate > 1e6


def test_a_slow_product_is_measured_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million operations a second: 1,024 columns would take half an hour."""
    asked: list[int] = []

    def fastest_product(size: int, dtype: torch.dtype, device: torch.device) -> float:
        asked.append(size)
        return 2e-6 * size**3

    monkeypatch.setattr(machine, "fastest_product", fastest_product)
    assert matmul_rate(torch.bfloat16, torch.device("cpu"), largest=1024, seconds=0.1) == pytest.approx(1e6)
    assert max(asked) == 64
