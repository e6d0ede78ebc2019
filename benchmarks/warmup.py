"""What a warm-up changes: whom exact influence selects, how well the product finds them, and what the training costs.

    python benchmarks/warmup.py --corpus DIR --cache DIR [--model FOLDER] [--out DIR]

The model is trained as the product's warm-up does, on rows of the pool that are not measured, for each number of steps, and
everything is measured anew on what it has become. It resumes after each checkpoint and each piece of gradients.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import Corpus, load_model, load_tokenizer, model_folder, samples_of
from fidelity_comparison import CHOSEN_ON, CONFIRMED_ON, TEXT, Comparison, groups
from fidelity_methods import Setting, budget_of
from fidelity_pool import arguments, measure
from figures import turn
from measuring import heading
from reporting import add_model, table

from service.plan import operations
from worker.influence import OptimizerOptions, round_robin
from worker.influence.batching import default_token_budget
from worker.loading.model_shape import counts_of, shape_of
from worker.training import Training, train


def main() -> None:
    parser = arguments(__doc__, [*CHOSEN_ON, *CONFIRMED_ON], rows=1000)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 64, 256])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--landmarks", type=int, default=128)
    options = parser.parse_args()
    base = model_folder(options)
    compared = {}
    for steps in options.steps:
        options.model = warmed_up(options, base, steps)
        compared[steps] = Comparison(measure(options, {}), {}, options)
    setting = Setting(name="text, 2.4 x", embedding=TEXT, landmarks=options.landmarks, times=2.4)
    first = compared[options.steps[0]]
    report = {
        **heading(options),
        **first.described(),
        "points": [
            {"steps": steps, **each.point(setting), "beside": beside(first, each), "cost": cost(options, base, steps)}
            for steps, each in compared.items()
        ],
    }
    add_model(options.out, "warmup", base.name, report, _tables)


def warmed_up(options: argparse.Namespace, base: Path, steps: int) -> Path:
    """The folder of the model after so many steps; it appears whole or not at all."""
    if not steps:
        return base
    folder: Path = options.cache / "models" / f"{base.name}-{steps}-steps"
    if folder.exists():
        return folder
    torch.set_num_threads(options.processes)
    model, tokenizer = load_model(base, torch.float32, options.device), load_tokenizer(base)
    samples = training_samples(options, base, steps)
    training = Training(
        epochs=1,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        optimizer=OptimizerOptions(type="adamw"),
        seed=options.seed,
        token_budget=default_token_budget(torch.device(options.device)),
    )
    train(
        model,
        dict(model.named_parameters()),
        samples,
        training,
        report=lambda *_: None,
        progress=lambda *_: None,
    )
    part = folder.with_name(f".{folder.name}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return folder


def training_samples(options: argparse.Namespace, base: Path, steps: int) -> Any:
    """The rows after those that are measured, in the same random order: as many as the steps take."""
    count = steps * options.batch_size
    rows = Corpus(options.corpus).pool(options.rows + 2 * count, options.seed)[options.rows :]
    samples = samples_of(rows, load_tokenizer(base), options.max_length)
    return samples.take(np.flatnonzero(samples.predicted())[:count])


def beside(first: Comparison, other: Comparison) -> dict[str, dict[str, float]]:
    """The exact choice of a warmed-up model by the exact influence of the model that was not: overlap and turn."""
    budget, found = budget_of(first.n), {}
    for name, targets in groups(list(first.P)).items():
        figures = []
        for target in targets:
            for seed in range(first.draws):
                best, chosen = (round_robin(each.P[target], budget, seed=seed) for each in (first, other))
                shared = len(np.intersect1d(best, chosen)) / budget
                figures.append((shared, turn(first.P[target], chosen, seed)))
        overlap, worth = np.mean(figures, axis=0)
        found[name] = {"overlap": round(float(overlap), 4), "turn": round(float(worth), 4)}
    return found


def cost(options: argparse.Namespace, base: Path, steps: int) -> dict[str, float]:
    """Operations of the training, 6 N T, and how many times those of RDS+'s pass over the measured pool they are."""
    if not steps:
        return {"operations": 0.0, "of_rds_plus": 0.0}
    model = load_model(base, torch.bfloat16, "cpu")
    shape, samples = shape_of(model), training_samples(options, base, steps)
    training = 3 * operations.forward(shape, counts_of(samples))
    rows = samples_of(Corpus(options.corpus).pool(options.rows, options.seed), load_tokenizer(base), options.max_length)
    rds = operations.embedding(shape, counts_of(rows), {"kind": "rds"})
    return {"operations": training, "of_rds_plus": training / rds}


def _tables(models: dict[str, Any]) -> list[str]:
    lines = ["# Warm-up\n"]
    for model, report in models.items():
        for group in report["points"][0]["by_group"]:
            rows = [
                [
                    point["steps"],
                    *(f"{point['by_group'][group][name]:.3f}" for name in ("spearman", "turn", "top")),
                    *(f"{point['beside'][group][name]:.3f}" for name in ("overlap", "turn")),
                    f"{point['cost']['of_rds_plus']:.2f}",
                ]
                for point in report["points"]
            ]
            header = ["steps", "Spearman", "turn, 2.4 x", "top, 2.4 x", "exact choice: overlap with that of no steps"]
            header += ["its turn by the influence of no steps", "cost of the training, RDS+ = 1"]
            lines += [f"## {model}, {group} targets, {report['usable']} samples\n", table(header, rows)]
    return lines


if __name__ == "__main__":
    main()
