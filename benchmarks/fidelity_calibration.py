"""Does the promise of quality hold? What was promised after each half budget, beside what the selection was truly worth.

Shape suffixes: n usable samples of the pool, t samples of a target, e embedding size.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from fidelity_methods import Setting, run
from torch import Tensor

POOLS = (500, 2000)
TIMES, ROUNDS = 5.0, 10
SHARE = 4  # a pool has at least so many times its landmarks
PROMISED = 0.95

Record = dict[str, Any]


def asked(E_ne: Tensor, influence: Mapping[str, Tensor], options: argparse.Namespace) -> Iterator[Record]:
    """Of every target, draw and number of landmarks, in the first samples of the pool and in all of it: one record a promise."""
    sizes = sorted({min(size, len(E_ne)) for size in POOLS})
    for size in sizes:
        for count in (count for count in options.landmarks if SHARE * count <= size):
            setting = Setting(name="", embedding="text", landmarks=count, times=TIMES, rounds=ROUNDS)
            for target, P_nt in influence.items():
                for seed in range(options.draws):
                    for times, promised, true in run(setting, E_ne[:size], P_nt[:size], seed, asks=True).promises:
                        where = {"pool": size, "landmarks": count, "target": target, "draw": seed}
                        figures = {"times": times, "promised": promised, "true": true}
                        yield {**where, **{name: round(value, 4) for name, value in figures.items()}}


def summary(records: Iterable[Record]) -> Record:
    """Bias and root mean square of promised less true turn, and their correlation."""
    promised, true = np.array([(each["promised"], each["true"]) for each in records]).T
    error = promised - true
    return {
        "promises": len(error),
        "bias": float(error.mean()),
        "rms": float(np.sqrt(np.square(error).mean())),
        "correlation": float(np.corrcoef(promised, true)[0, 1]) if len(error) > 2 else float("nan"),
    }


def stopped(records: Iterable[Record]) -> Record:
    """Of every run that was promised `PROMISED` somewhere: what it was truly worth at the first such promise."""
    run_of = itemgetter("pool", "landmarks", "target", "draw")
    first = [
        next((each for each in of if each["promised"] >= PROMISED), None)
        for _, of in groupby(sorted(records, key=run_of), key=run_of)
    ]
    true = [each["true"] for each in first if each is not None]
    times = [each["times"] for each in first if each is not None]
    return {
        "runs": len(first),
        "stopped": len(true),
        "true": float(np.mean(true)) if true else None,
        "least": min(true, default=None),
        "times": float(np.mean(times)) if times else None,
    }
