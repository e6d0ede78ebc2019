"""How many blocks, and how many tangents, an embedding is worth: fidelity against cost, from tokens alone to all blocks.

    python benchmarks/blocks.py --corpus DIR --cache DIR [--model FOLDER] [--out DIR]

The hidden state after each number of blocks, and its derivative along each number of directions, beside the embedding of tokens,
which runs none: with nothing refined, and with a shortlist of 2.4 times the budget in rounds. It resumes, and shares the cache of
benchmarks/fidelity.py; a JVP of all blocks costs as much as the exact gradients.
"""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

from corpus import model_folder
from fidelity_comparison import CHOSEN_ON, CONFIRMED_ON, TEXT, Comparison, Point
from fidelity_methods import Setting
from fidelity_pool import arguments, measure
from measuring import heading
from reporting import add_model, table
from transformers import AutoConfig

from worker.influence import EmbeddingOptions

TIMES = (0.0, 2.4)


def main() -> None:
    parser = arguments(__doc__, [*CHOSEN_ON, *CONFIRMED_ON])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8, 15, 30])
    parser.add_argument("--tangents", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--deepest-jvp", type=int, default=8, help="the most blocks of a JVP")
    parser.add_argument("--landmarks", type=int, default=128)
    options = parser.parse_args()
    kinds = embeddings(options)
    comparison = Comparison(measure(options, kinds), kinds, options)
    report = {
        **heading(options),
        **comparison.described(),
        "points": [comparison.point(each) for each in settings(options, kinds)],
    }
    add_model(options.out, "blocks", model_folder(options).name, report, _tables)


def embeddings(options: argparse.Namespace) -> dict[str, EmbeddingOptions]:
    """Those that pass through the model, of at most all of its blocks."""
    total = int(AutoConfig.from_pretrained(model_folder(options)).get_text_config().num_hidden_layers)
    depths = sorted({min(blocks, total) for blocks in options.blocks})
    hidden = {
        f"hidden {blocks} {pooling}": EmbeddingOptions(kind="hidden", pooling=pooling, blocks=blocks)
        for blocks, pooling in itertools.product(depths, ("last", "response"))
    }
    derivatives = {
        f"jvp {blocks} last, {tangents}": EmbeddingOptions(kind="jvp", pooling="last", blocks=blocks, tangents=tangents)
        for blocks, tangents in itertools.product(depths, options.tangents)
        if blocks <= options.deepest_jvp
    }
    return {**hidden, **derivatives}


def settings(options: argparse.Namespace, kinds: dict[str, EmbeddingOptions]) -> Iterator[Setting]:
    for embedding, times in itertools.product((TEXT, *kinds), TIMES):
        yield Setting(name=embedding, embedding=embedding, landmarks=options.landmarks, times=times)


def _tables(models: dict[str, Any]) -> list[str]:
    lines = ["# Blocks and tangents\n"]
    for model, report in models.items():
        for group in report["points"][0]["by_group"]:
            lines += [f"## {model}, {group} targets, {report['usable']} samples\n", _table(report["points"], group)]
    return lines


def _table(points: list[Point], group: str) -> str:
    header = ["embedding", "Spearman", "turn, nothing refined", "turn, 2.4 x", "top, 2.4 x"]
    rows = []
    for bare, refined in zip(points[::2], points[1::2], strict=True):
        before, after = bare["by_group"][group], refined["by_group"][group]
        figures = (before["spearman"], before["turn"], after["turn"], after["top"])
        costs = (before["by_formula"], after["by_formula"], after["measured"])
        rows.append([bare["name"], *(f"{each:.3f}" for each in figures), *(f"{each:.2f}" for each in costs)])
    costs_of = ["RDS+ costs, nothing refined, by the formula", "2.4 x, by the formula", "2.4 x, here"]
    return table([*header, *costs_of], rows)


if __name__ == "__main__":
    main()
