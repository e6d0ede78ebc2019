"""How well the product's approximation finds what exact influence would select, and for how many operations.

    python benchmarks/fidelity.py --corpus DIR --cache DIR [--model FOLDER] [--out DIR]

The ground truth is exact influence on a random part of the pool. For every setting: turn, top, overlap, NDCG and Spearman
(benchmarks/figures.py), and how many times dearer RDS+ is, as means over draws of landmarks; the targets that the defaults were
chosen on apart from those that confirm them. Beside them the calibration of the promise of quality. One model a run: the result
keeps those of other models. Measurements with the model are kept in the cache, so an interrupted run resumes. Only the targets'
dev splits are read.

Shape suffixes: n usable samples of the pool, t samples of a target, e embedding size.
"""

import argparse
from collections.abc import Iterator

from corpus import model_folder
from fidelity_calibration import asked
from fidelity_comparison import CHOSEN_ON, CONFIRMED_ON, PAPER_POOL, RDS, TEXT, Comparison, landmarks_of
from fidelity_cost import product_cap, times_within
from fidelity_methods import Setting, budget_of
from fidelity_pool import Pool, arguments, measure
from fidelity_report import write_report
from measuring import heading
from reporting import earlier

from worker.influence import EmbeddingOptions

RATIOS = (3.5, 1.8)
HIDDEN, JVP, OUTPUT = "hidden 4 response", "jvp 4 last", "output"
RIVALS = ("hidden", "jvp", "rds", "output")


def main() -> None:
    parser = arguments(__doc__, [*CHOSEN_ON, *CONFIRMED_ON])
    parser.add_argument(
        "--landmarks", type=int, nargs="+", default=[64, 128, 256], help="numbers beside the product's own"
    )
    parser.add_argument(
        "--times", type=float, nargs="+", default=[0.0, 2.4, 2.75, 5.0], help="shortlists, x the budget"
    )
    parser.add_argument("--blocks", type=int, default=4, help="of the embeddings that are compared")
    parser.add_argument(
        "--rivals", nargs="*", choices=RIVALS, default=RIVALS, help="embeddings that pass through the model"
    )
    options = parser.parse_args()
    offered = {
        HIDDEN: EmbeddingOptions(kind="hidden", pooling="response", blocks=options.blocks),
        JVP: EmbeddingOptions(kind="jvp", pooling="last", blocks=options.blocks, tangents=2),
        RDS: EmbeddingOptions(kind="rds"),
        OUTPUT: EmbeddingOptions(kind="output"),
    }
    kinds = {name: each for name, each in offered.items() if each.kind in options.rivals}
    comparison = Comparison(measure(options, kinds, of_targets=[RDS] if RDS in kinds else []), kinds, options)
    report = {
        **heading(options),
        **comparison.described(),
        "points": [
            *map(comparison.point, settings(comparison.pool, options, kinds)),
            *([comparison.beside("rds_plus", comparison.rds_plus)] if RDS in kinds else []),
            comparison.beside("exact, other random signs", comparison.other_signs),
        ],
        "calibration": list(asked(comparison.E[TEXT], comparison.P, options)),
    }
    if options.out is not None:
        write_report(
            options.out, {"models": {**earlier(options.out / "fidelity.json"), model_folder(options).name: report}}
        )


def settings(pool: Pool, options: argparse.Namespace, kinds: dict[str, EmbeddingOptions]) -> Iterator[Setting]:
    """The product's settings and their rivals, for every number of landmarks that leaves half of the samples."""
    usable, at_scale = pool.usable.size, landmarks_of(PAPER_POOL)
    own = landmarks_of(usable)
    if own <= usable // 2:
        yield Setting(
            name="the default, as it is capped for this pool",
            embedding=TEXT,
            landmarks=own,
            times=product_cap(pool, budget_of(usable - own)),
            until=0.95,
        )
    for count in sorted({own, *options.landmarks}):
        if count > usable // 2:
            continue
        for ratio in RATIOS:
            most = times_within(None, landmarks=at_scale, ratio=ratio)
            name = f"text, until 0.95 is promised or RDS+/{ratio}"
            yield Setting(name=name, embedding=TEXT, landmarks=count, times=most, until=0.95)
        for times in options.times:
            yield Setting(name=f"text, {times} x", embedding=TEXT, landmarks=count, times=times)
        for times in options.times if OUTPUT in kinds else ():
            yield Setting(name=f"output, {times} x", embedding=OUTPUT, landmarks=count, times=times)
        same = times_within(kinds[HIDDEN], landmarks=at_scale, ratio=RATIOS[0]) if HIDDEN in kinds else 0.0
        for rounds in (1, 8) if same else ():
            name = f"hidden, {same:.2g} x, {rounds} round{'s' * (rounds > 1)}"
            yield Setting(name=name, embedding=HIDDEN, landmarks=count, times=same, rounds=rounds)
        if JVP not in kinds:
            continue
        yield Setting(name="as the authors set it", embedding=JVP, landmarks=count, times=0.0, kernel="rbf", ridge=0.01)


if __name__ == "__main__":
    main()
