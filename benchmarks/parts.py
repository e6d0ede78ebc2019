"""What each part of the embedding of tokens is worth, and what the kernel and the rounds are.

    python benchmarks/parts.py --corpus DIR --cache DIR [--model FOLDER] [--out DIR]

Every variant refines a shortlist of 2.4 times the budget. No passes through the model but those of the exact gradients, which
benchmarks/fidelity.py keeps in the same cache.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from corpus import model_folder
from fidelity_comparison import CHOSEN_ON, CONFIRMED_ON, TEXT, Comparison, scaled_on
from fidelity_methods import Setting
from fidelity_pool import Pool, arguments, measure
from measuring import heading
from reporting import add_model, table
from torch import Tensor, nn

from worker.influence import Samples
from worker.influence.samples import count_per_sample
from worker.influence.text_embedding import DIRECTIONS, PARTS, PartScale, text_parts


def main() -> None:
    parser = arguments(__doc__, [*CHOSEN_ON, *CONFIRMED_ON])
    parser.add_argument("--landmarks", type=int, nargs="+", default=[64, 128])
    options = parser.parse_args()
    comparison = Comparison(measure(options, {}), {}, options)
    product = Setting(name="the product's", embedding=TEXT, landmarks=0, times=2.4)
    settings = [product]
    for name, E_ne in variants(comparison.pool, options.seed):
        comparison.E[name] = E_ne.half().double()
        settings.append(replace(product, name=name, embedding=name))
    settings += [replace(product, name=f"kernel {kernel}", kernel=kernel) for kernel in ("laplacian", "rbf")]
    settings += [replace(product, name=f"{rounds} rounds", rounds=rounds) for rounds in (1, 4, 16)]
    report = {
        **heading(options),
        **comparison.described(),
        "points": [
            comparison.point(replace(setting, landmarks=count)) for setting in settings for count in options.landmarks
        ],
    }
    add_model(options.out, "parts", model_folder(options).name, report, _tables)


def variants(pool: Pool, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Embeddings (n, e) of the usable samples by name; each leaves something out of the product's, or adds or replaces it."""
    samples, places = pool.samples.take(pool.usable), scaled_on(pool, seed)
    parts, weights = text_parts(samples, seed), {name: part.weight for name, part in PARTS.items()}

    def scaled(values: Mapping[str, Tensor]) -> Tensor:
        scales = {
            name: PartScale.of(of[places], weights[name], is_standardised=PARTS[name].is_standardised)
            for name, of in values.items()
        }
        return torch.cat([scales[name].apply(of) for name, of in values.items()], dim=1)

    def without(*names: str) -> Tensor:
        return scaled({name: of for name, of in parts.items() if name not in names})

    yield "no scalars", without("scalars")
    yield "no prompt", without("prompt")
    yield "scalars alone", without("reply", "prompt")
    yield "lengths alone", scaled({"scalars": parts["scalars"][:, :2]})
    yield "and surprisal", scaled({**parts, "scalars": torch.cat([parts["scalars"], _surprisal(samples)], dim=1)})
    yield "64 columns", scaled({**parts, **{side: _narrower(parts[side], 64, seed) for side in ("reply", "prompt")}})
    directions = np.random.default_rng(seed).standard_normal((pool.token_rows.shape[1], DIRECTIONS), dtype=np.float32)
    rows = pool.token_rows.float() @ torch.from_numpy(directions)
    yield "the model's rows in place of signs", scaled({**parts, **_sides(samples, rows)})
    signs = torch.from_numpy(np.random.default_rng(seed).choice(np.float32([-1, 1]), tuple(rows.shape)))
    yield "signs by surprisal", scaled({**parts, **_sides(samples, signs * _token_surprisal(samples, len(rows)))})
    for weight in (1.0, 4.0):
        weights["scalars"] = weight
        yield f"scalars of weight {weight:g}", scaled(parts)


def _narrower(direction_nq: Tensor, width: int, seed: int) -> Tensor:
    """Unit rows of fewer columns, by a random projection."""
    projection = np.random.default_rng(seed).standard_normal((direction_nq.shape[1], width), dtype=np.float32)
    return nn.functional.normalize(direction_nq @ torch.from_numpy(projection), dim=1)


def _sides(samples: Samples, rows_Vq: Tensor) -> dict[str, Tensor]:
    """The sum of the rows of each side's tokens, of unit length, (n, q)."""
    found = {}
    for side, marked in (("reply", samples.response), ("prompt", ~samples.response)):
        ends = np.cumsum([0, *count_per_sample(marked, samples.offsets)])
        ids = torch.from_numpy(samples.input_ids[marked].astype(np.int64))
        sums = nn.functional.embedding_bag(ids, rows_Vq, torch.from_numpy(ends), mode="sum", include_last_offset=True)
        found[side] = nn.functional.normalize(sums, dim=1)
    return found


def _token_surprisal(samples: Samples, size: int) -> Tensor:
    """-log of each token's share of the pool's tokens, (V, 1); as of one occurrence where there is none."""
    counts = torch.from_numpy(np.bincount(samples.input_ids, minlength=size)).clamp_min(1)
    return (np.log(samples.input_ids.size) - counts.log()).float()[:, None]


def _surprisal(samples: Samples) -> Tensor:
    """The mean surprisal of each reply's tokens, (n, 1); 0 where there are none."""
    of_tokens = _token_surprisal(samples, int(samples.input_ids.max()) + 1)[samples.input_ids.astype(np.int64), 0]
    sample = torch.from_numpy(np.repeat(np.arange(len(samples)), samples.lengths))
    reply = torch.from_numpy(samples.response)
    sums = torch.zeros(len(samples)).index_add_(0, sample[reply], of_tokens[reply])
    counts = torch.from_numpy(count_per_sample(samples.response, samples.offsets)).clamp_min(1)
    return (sums / counts)[:, None]


def _tables(models: dict[str, Any]) -> list[str]:
    lines = ["# Parts of the embedding of tokens, kernels and rounds\n"]
    for model, report in models.items():
        for group in report["points"][0]["by_group"]:
            rows = []
            for point in report["points"]:
                figures = point["by_group"][group]
                each = [f"{figures[name]:.3f} ± {figures['sd'][name]:.3f}" for name in ("turn", "top", "spearman")]
                rows.append([point["name"], point["landmarks"], *each])
            title = f"## {model}, {group} targets, {report['usable']} samples, {report['draws']} draws of landmarks\n"
            lines += [title, table(["variant", "landmarks", "turn", "top", "Spearman"], rows)]
    return lines


if __name__ == "__main__":
    main()
