"""The tables of the speed benchmark, and the breakdown of a stage's time."""

from collections.abc import Callable
from typing import Any

from reporting import table
from torch.profiler import ProfilerActivity, profile

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


def breakdown(run: Callable[[], Any]) -> dict[str, float]:
    """Share of CPU time by kind of operator, in a run under torch.profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    shares = dict.fromkeys([*GROUPS, "rest"], 0.0)
    for event in profiler.key_averages():
        found = (group for group, names in GROUPS.items() if any(name in event.key for name in names))
        group = next(found, "rest") if event.key.startswith("aten::") else "rest"
        shares[group] += event.self_cpu_time_total
    whole = sum(shares.values())
    return {group: spent / whole for group, spent in shares.items()}


def tables(result: dict[str, Any]) -> str:
    parts = [_stages(one) for one in result["stages"]]
    parts += [found if isinstance(found := result["authors"], str) else _authors(found)]
    return "\n".join(f"{part.rstrip()}\n" for part in parts)


def _stages(one: dict[str, Any]) -> str:
    rows = [
        (
            stage["stage"],
            stage["dtype"],
            f"{stage['seconds']:.3g}",
            f"{stage['rows_per_second']:,.0f} {stage['unit']}/s",
            _number(stage["operations"], "{:.3g}", 1e-9),
            _number(stage["share_of_matmul_rate"], "{:.0%}"),
            _spread(stage["share_mean"], stage["share_sd"], "{:.0%}"),
            _number(stage.get("times_one_by_one"), "{:.1f}x"),
            _number(stage.get("difference"), "{:.0e}"),
            _number(stage["peak_memory_bytes"], "{:.0f}", 2**-20),
        )
        for stage in one["stages"]
    ]
    head = f"{one['model']}, {one['weights'] / 1e6:,.1f} M weights, {one['dtype']}, {one['device']}"
    header = [
        *(f"{head}: stage", "products in", "s", "rate", "GFLOP", "share of the matmul rate"),
        *("mean ± sd", "one by one", "difference", "peak MiB"),
    ]
    rates = {stage["dtype"]: stage["matmul_rate"] for stage in one["stages"] if stage["matmul_rate"]}
    return (
        table(header, rows)
        + "\n"
        + table(["matrix products in", "GFLOP/s"], [(dtype, f"{rate / 1e9:,.0f}") for dtype, rate in rates.items()])
    )


def _authors(found: dict[str, Any]) -> str:
    header = [f"authors' code, {found['commit']}, {found['dtype']}", "their s", "our s", "theirs / ours", "cosine"]
    rows = [
        (
            name,
            *(f"{min(found[name][side]):.2f}" for side in ("their_seconds", "our_seconds")),
            _spread(found[name]["ratio"], found[name]["ratio_sd"], "{:.2f}"),
            f"{found['agreement'][cosine]:.7f}",
        )
        for name, cosine in (("gradients", "gradient_cosine"), ("jvp", "jvp_cosine"))
    ]
    return table(header, rows)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else form.format(value * scale)


def _spread(mean: float | None, deviation: float | None, form: str) -> str:
    return _number(mean, form) if deviation is None else f"{_number(mean, form)} ± {form.format(deviation)}"
