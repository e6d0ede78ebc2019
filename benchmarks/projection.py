"""The error of projected gradients: their cosines compared with those of whole gradients.

    python benchmarks/projection.py --corpus DIR --cache DIR [--out DIR]

A few rows of the pool against a few of each target: the product's projection at several sizes, compared with the usual one, a few
random directions on either side of every layer. An error must be small relative to the spread of the true cosines.

Shape suffixes: n rows of the pool, t targets, d weights, k values, O and I layer output and input, p directions per side.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from corpus import Corpus, cached, common_arguments, load_model, load_tokenizer, model_folder, samples_of
from measuring import heading
from reporting import table, write_json
from torch import Tensor

from worker.influence import GradientProjection, Samples, fidelity, per_sample_gradients
from worker.influence.causal_lm import layer_size, linear_layers

AT_A_TIME = 4
"""Number of rows whose whole gradients are in memory."""
Project = Callable[[Tensor], Tensor]


def main() -> None:
    options = common_arguments(__doc__, rows=32, targets=["gsm8k", "squad", "bbh"])
    options.add_argument("--target-rows", type=int, default=4)
    options.add_argument("--dims", type=int, nargs="+", default=[4096, 8192, 16_384, 32_768])
    options.add_argument("--dtype", default="bfloat16")
    given = options.parse_args()
    torch.set_num_threads(1)
    cosines = measured(given)
    exact_nt = cosines.pop("exact")
    kept = exact_nt.abs().sum(dim=1) > 0
    found = [figures(name, exact_nt[kept], P_nt[kept], given) for name, P_nt in cosines.items()]
    found.sort(key=lambda each: (each["projection"], each["values"]))
    spread = float((exact_nt[kept] - exact_nt[kept].mean(dim=0)).std())
    report = {**heading(given), "rows": int(kept.sum()), "spread_of_cosines": round(spread, 4), "projections": found}
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        write_json(given.out / "projection.json", report)
        header = ["projection", "values", "error", "bias", *(f"Spearman, {name}" for name in given.targets)]
        rows = [
            [
                each["projection"],
                each["values"],
                f"{each['error']:.4f}",
                f"{each['bias']:+.4f}",
                *each["spearman"].values(),
            ]
            for each in found
        ]
        (given.out / "projection.md").write_text(f"Spread of the exact cosines: {spread:.3f}\n\n{table(header, rows)}")


def figures(name: str, exact_nt: Tensor, P_nt: Tensor, given: argparse.Namespace) -> dict[str, Any]:
    """Error: the standard deviation of the error of a cosine; Spearman: mean over the rows of a target."""
    agreed = [value or 0.0 for value in fidelity(exact_nt, P_nt).spearman]
    start, by_target = 0, {}
    for target in given.targets:
        count = len(Corpus(given.corpus).target(target, "dev")[: given.target_rows])
        by_target[target] = round(float(np.mean(agreed[start : start + count])), 3)
        start += count
    what, values = name.rsplit(" ", 1)
    errors_nt = P_nt - exact_nt
    return {
        "projection": what,
        "values": int(values),
        "error": round(float(errors_nt.std()), 5),
        "bias": round(float(errors_nt.mean()), 5),
        "spearman": by_target,
    }


def measured(given: argparse.Namespace) -> dict[str, Tensor]:
    """Cosines (n, t), exact and under each projection, a few rows at a time from the cache."""
    corpus, folder = Corpus(given.corpus), model_folder(given)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, getattr(torch, given.dtype), given.device)
    projections = offered(model, given)
    targets = [row for name in given.targets for row in corpus.target(name, "dev")[: given.target_rows]]
    pool = samples_of(corpus.pool(given.rows, given.seed), tokenizer, given.max_length)
    G_td = whole(model, samples_of(targets, tokenizer, given.max_length))
    of_targets = {name: project(G_td) for name, project in projections.items()}
    dims = "-".join(map(str, given.dims))
    setup = f"{folder.name}-{given.dtype}-{given.max_length}-{given.seed}-{'-'.join(given.targets)}-{given.target_rows}-{dims}"
    pieces = []
    for start in range(0, len(pool), AT_A_TIME):

        def make(part: Samples = pool.slice(start, min(start + AT_A_TIME, len(pool)))) -> dict[str, Tensor]:
            G_nd = whole(model, part)
            found = {name: cosines(project(G_nd), of_targets[name]) for name, project in projections.items()}
            return {"exact": cosines(G_nd, G_td), **found}

        pieces.append(cached(given.cache / "projection" / setup / f"{start:05d}.safetensors", make)[0])
    return {name: torch.cat([piece[name] for piece in pieces]).double() for name in pieces[0]}


def cosines(G_nd: Tensor, G_td: Tensor) -> Tensor:
    """(n, t) in float32: whole gradients are too large for `cosine_influence`, which makes float64 copies."""
    norms_nt = G_nd.norm(dim=1)[:, None] * G_td.norm(dim=1)
    return (G_nd @ G_td.T) / norms_nt.clamp_min(torch.finfo(torch.float32).tiny)


def whole(model: Any, samples: Samples) -> Tensor:
    """Gradients (n, d), float32, one sample at a time: a batch would hold the whole gradients of all its samples."""
    G_nd = torch.empty(len(samples), sum(out * into for out, into in layer_sizes(model).values()))
    for i in range(len(samples)):
        G_nd[i] = per_sample_gradients(model, samples.slice(i, i + 1), projection=None).values[0]
    return G_nd


def layer_sizes(model: Any) -> dict[str, tuple[int, int]]:
    return {name: layer_size(layer) for name, layer in linear_layers(model, "down_proj").items()}


def offered(model: Any, given: argparse.Namespace) -> dict[str, Project]:
    """Each projection, by its name and number of values."""
    sizes = layer_sizes(model)
    found: dict[str, Project] = {}
    for dim in given.dims:
        side = max(1, int((dim / len(sizes)) ** 0.5))
        values = len(sizes) * side**2
        found[f"random directions on either side, a block for each layer {values}"] = either_side(sizes, side)
    for dim in given.dims:
        found[f"the product's {dim}"] = product(sizes, GradientProjection(dim, seed=given.seed))
    dim = given.dims[-2]
    for directions in (16, 64, 1_000_000):
        reduction = (
            f"{directions} directions on the input side" if directions < 1_000_000 else "no reduction of the input side"
        )
        found[f"the product's, {reduction} {dim}"] = product(
            sizes, GradientProjection(dim, seed=given.seed, directions=directions)
        )
    return found


def product(sizes: dict[str, tuple[int, int]], projection: GradientProjection) -> Project:
    layers = {name: projection.layer(name, *size) for name, size in sizes.items()}

    def project(G_nd: Tensor) -> Tensor:
        parts = split(G_nd, sizes)
        return torch.stack([layers[name].apply(G_nOI) for name, G_nOI in parts.items()]).sum(dim=0)

    return project


def either_side(sizes: dict[str, tuple[int, int]], side: int) -> Project:
    """P_outᵀ G P_in for every layer, with random signs in both: (n, layers p p)."""
    generator = torch.Generator().manual_seed(0)

    def signs(rows: int) -> Tensor:
        return torch.randint(0, 2, (rows, side), generator=generator).float() * 2 - 1

    sides = {name: (signs(size[0]), signs(size[1])) for name, size in sizes.items()}

    def project(G_nd: Tensor) -> Tensor:
        parts = split(G_nd, sizes)
        return torch.cat([(sides[name][0].T @ (G @ sides[name][1])).flatten(1) for name, G in parts.items()], dim=1)

    return project


def split(G_nd: Tensor, sizes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """(n, O, I) by layer."""
    parts = G_nd.split([out * into for out, into in sizes.values()], dim=1)
    return {name: part.unflatten(1, size) for (name, size), part in zip(sizes.items(), parts, strict=True)}


if __name__ == "__main__":
    main()
