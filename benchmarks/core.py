"""Speed of the gradient and embedding stages beside the machine's matrix-product rate and a one-sample-at-a-time baseline.

    python benchmarks/core.py --model DIR [--json]

Every figure is the best of `--rounds`, the rounds of all stages and the rate measurements taken in turn, so that what else the
machine does disturbs neither side of a ratio alone. A call's setup (drawing directions, checking the model) is the same for ten
samples and ten million, so it is timed by itself, on no samples, and left out of the shares. Operation counts are those of
`worker.influence.flops`: what the method needs, without padding and elementwise work. Without `--model` the model is random,
of the shape of a 135M Llama.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, jvp
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from worker.influence import (
    EmbeddingOptions,
    FactoredProjection,
    Samples,
    embed,
    embedding_flops,
    gradient_flops,
    measured_matmul_rate,
    per_sample_gradients,
)
from worker.influence.dual import random_tangents
from worker.influence.models import first_blocks, linear_layers

PROJECTION = FactoredProjection()
GROUPS = {
    "head and loss": ("log_softmax", "nll_loss"),
    "attention": ("scaled_dot_product", "bmm", "_softmax", "masked_fill"),
    "matmul": ("aten::mm", "addmm", "mkldnn_linear"),
    "copies and fills": ("copy_", "fill_", "cat", "index"),
    "norm and elementwise": (
        "aten::mul",
        "add",
        "silu",
        "pow",
        "mean",
        "rsqrt",
        "neg",
        "sum",
        "div",
        "sub",
        "var",
        "gelu",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage on one model: how to run it, and what it costs by the books."""

    name: str
    dtype: str
    run: Callable[[Samples], Any]
    baseline: Callable[[Samples], None]
    operations: float


def main() -> None:
    options = arguments()
    samples = random_samples(options.samples, options.shortest, options.longest)
    stages = [
        stage
        for dtype in options.dtypes
        for stage in stages_of(load(options.model, getattr(torch, dtype)), dtype, samples, options)
    ]
    rates = dict.fromkeys(options.dtypes, 0.0)
    seconds = dict.fromkeys(range(len(stages)), float("inf"))
    setup = dict(seconds)
    for _ in range(options.rounds):
        for index, stage in enumerate(stages):
            seconds[index] = min(seconds[index], timed(stage.run, samples))
            setup[index] = min(setup[index], timed(stage.run, samples.slice(0, 0)))
            rate = measured_matmul_rate(getattr(torch, stage.dtype), options.device, seconds=0.3)
            rates[stage.dtype] = max(rates[stage.dtype], rate)
    reports = [
        report(stage, samples, seconds[index] - setup[index], rates[stage.dtype], options)
        | {"setup_seconds": setup[index]}
        for index, stage in enumerate(stages)
    ]
    if options.json:
        print(json.dumps({"options": vars(options), "tokens": int(samples.lengths.sum()), "stages": reports}, indent=2))
    else:
        show(samples, rates, reports)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a model; a random one of the shape of a 135M Llama when absent")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--shortest", type=int, default=60, help="tokens of the shortest sample")
    parser.add_argument("--longest", type=int, default=300, help="tokens of the longest sample")
    parser.add_argument("--token-budget", type=int, default=None, help="the package's default when absent")
    parser.add_argument("--stages", nargs="+", default=["gradients", "jvp", "hidden"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--baseline-samples", type=int, default=3, help="samples that the slow baseline is timed on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def load(directory: str | None, dtype: torch.dtype) -> Any:
    if directory:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, use_safetensors=True).eval()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_samples(count: int, shortest: int, longest: int) -> Samples:
    """Random tokens; the second half of each sample is the response."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(shortest, longest + 1, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return Samples(
        input_ids=generator.integers(0, 49152, offsets[-1]).astype(np.int32),
        response=place >= np.repeat(lengths // 2, lengths),
        offsets=offsets,
    )


def stages_of(model: Any, dtype: str, samples: Samples, options: argparse.Namespace) -> list[Stage]:
    model.to(options.device)
    budget = options.token_budget
    stages = []
    if "gradients" in options.stages:
        stages.append(
            Stage(
                name="gradients",
                dtype=dtype,
                run=lambda part: per_sample_gradients(model, part, projection=PROJECTION, token_budget=budget),
                baseline=lambda part: gradients_one_by_one(model, part),
                operations=gradient_flops(model, samples, projection=PROJECTION).total,
            )
        )
    for kind in ("jvp", "hidden"):
        if kind in options.stages:
            embedding = EmbeddingOptions(kind=kind)
            stages.append(
                Stage(
                    name=kind,
                    dtype=dtype,
                    run=lambda part, embedding=embedding: embed(model, part, options=embedding, token_budget=budget),
                    baseline=lambda part, embedding=embedding: embed_one_by_one(model, part, embedding),
                    operations=embedding_flops(model, samples, options=embedding).total,
                )
            )
    return stages


def timed(run: Callable[[Samples], Any], samples: Samples) -> float:
    start = time.perf_counter()
    run(samples)
    return time.perf_counter() - start


def ids_of(samples: Samples, i: int, model: Any) -> torch.Tensor:
    ids = samples.input_ids[samples.offsets[i] : samples.offsets[i + 1]].astype(np.int64)
    return torch.from_numpy(ids)[None].to(model.device)


def gradients_one_by_one(model: Any, samples: Samples) -> None:
    """Plain autograd.grad, one sample at a time, projected afterwards."""
    layers = linear_layers(model, "down_proj")
    for p in model.parameters():
        p.requires_grad_(False)
    weights = [layer.weight.requires_grad_() for layer in layers.values()]
    for i in range(len(samples)):
        labels = ids_of(samples, i, model)
        marked = torch.from_numpy(samples.response[samples.offsets[i] : samples.offsets[i + 1]].copy())
        loss = model(labels, labels=labels.masked_fill(~marked.to(labels.device), -100)).loss
        for (name, _), gradient in zip(layers.items(), torch.autograd.grad(loss, weights), strict=True):
            size = (gradient.shape[0], gradient.shape[1])
            PROJECTION.layer(name, len(layers), *size, dtype=gradient.dtype, device=model.device).apply(gradient)
    for weight in weights:
        weight.requires_grad_(False)


@torch.no_grad()
def embed_one_by_one(model: Any, samples: Samples, options: EmbeddingOptions) -> None:
    """torch.func.jvp, one sample and one direction at a time; for `hidden` the plain forward."""
    base = first_blocks(model.base_model, options.blocks)
    own, base.config._attn_implementation = base.config._attn_implementation, "eager"
    tangents = random_tangents(base, options.blocks, options.tangents, options.seed) if options.kind == "jvp" else {}
    parameters = {name: p.detach() for name, p in base.named_parameters() if name in tangents}
    for i in range(len(samples)):
        ids = ids_of(samples, i, model)

        def state(values: dict[str, torch.Tensor], ids: torch.Tensor = ids) -> torch.Tensor:
            return functional_call(base, values, (ids,), {"use_cache": False}).last_hidden_state

        if options.kind == "hidden":
            state({})
        for j in range(options.tangents if options.kind == "jvp" else 0):
            jvp(state, (parameters,), ({name: t[j] for name, t in tangents.items()},))
    base.config._attn_implementation = own


def report(stage: Stage, samples: Samples, seconds: float, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    few = samples.slice(0, min(options.baseline_samples, len(samples)))
    setup = timed(stage.baseline, samples.slice(0, 0))
    slow = min(timed(stage.baseline, few) - setup for _ in range(2)) * samples.lengths.sum() / few.lengths.sum()
    return {
        "stage": stage.name,
        "dtype": stage.dtype,
        "seconds": seconds,
        "samples_per_second": len(samples) / seconds,
        "tokens_per_second": float(samples.lengths.sum() / seconds),
        "operations": stage.operations,
        "matmul_rate": rate,
        "share_of_matmul_rate": stage.operations / seconds / rate,
        "times_one_by_one": float(slow / seconds),
        "time_by_group": breakdown(stage, samples),
    }


def breakdown(stage: Stage, samples: Samples) -> dict[str, float]:
    """Share of the time by kind of operator, in a run under torch.profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        stage.run(samples)
    shares = dict.fromkeys([*GROUPS, "rest"], 0.0)
    for event in profiler.key_averages():
        found = (group for group, names in GROUPS.items() if any(name in event.key for name in names))
        if event.key.startswith("aten::"):
            shares[next(found, "rest")] += event.self_cpu_time_total
        else:
            shares["rest"] += event.self_cpu_time_total
    whole = sum(shares.values())
    return {group: time_spent / whole for group, time_spent in shares.items()}


def show(samples: Samples, rates: dict[str, float], reports: list[dict[str, Any]]) -> None:
    print(f"{len(samples)} samples, {samples.lengths.sum()} tokens, {torch.get_num_threads()} threads")
    for dtype, rate in rates.items():
        print(f"matrix products, {dtype}: {rate / 1e9:.0f} GFLOP/s")
    for r in reports:
        print(
            f"\n{r['stage']}, {r['dtype']}: {r['samples_per_second']:.2f} samples/s, {r['tokens_per_second']:.0f} tokens/s, "
            f"{r['operations'] / 1e9:.0f} GFLOP, {r['share_of_matmul_rate']:.0%} of the matmul rate, "
            f"{r['times_one_by_one']:.1f}x one by one, setup {r['setup_seconds']:.2f} s"
        )
        print("  " + ", ".join(f"{group} {share:.0%}" for group, share in r["time_by_group"].items()))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        main()
