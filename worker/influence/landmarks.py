"""The order in which samples become landmarks (METHOD 2): every prefix of it is a set of landmarks.

So that more landmarks can be asked for while those there are keep their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .projection import seeded_generator
from .samples import IntArray

Choice = Literal["uniform", "stratified"]


def landmark_order(
    usable_n: IntArray, *, choice: Choice, seed: int, sources: Sequence[str | None] | None = None
) -> IntArray:
    """A permutation of the usable samples (m,), int64, from the seed; the first l of it are l landmarks.

    choice: `uniform`, every order as likely as any other; `stratified`, each prefix holds every source in its share of the
    usable samples, to within one or two, and is uniform within a source.
    usable_n: int64 (m,), indices into the pool.  sources: (m,), of each usable sample; samples without one are a
    source of their own. `uniform` does not look at them.
    Raises ValueError for an unknown choice, and where `stratified` has no sources or not one for each sample.
    """
    generator = seeded_generator(seed, "landmarks")
    shuffled_m = generator.permutation(len(usable_n))
    if choice == "uniform":
        return usable_n[shuffled_m]
    if choice != "stratified":
        raise ValueError(f"choice must be uniform or stratified, not {choice!r}")
    if sources is None or len(sources) != len(usable_n):
        given = "none are given" if sources is None else f"there are {len(sources)}"
        raise ValueError(f"stratified landmarks need a source for each of the {len(usable_n)} usable samples: {given}")
    numbers: dict[str | None, int] = {}
    source_m = np.array([numbers.setdefault(source, len(numbers)) for source in sources], dtype=np.int64)[shuffled_m]
    # The j-th of a source's samples comes at (j + u) / count of the way: sources are laid out evenly beside each other.
    counts = np.bincount(source_m, minlength=len(numbers))
    grouped_m = np.argsort(source_m, kind="stable")
    rank_m = np.empty(len(usable_n))
    rank_m[grouped_m] = np.arange(len(usable_n)) - np.repeat(np.cumsum(counts) - counts, counts)
    place_m = (rank_m + generator.random(len(numbers))[source_m]) / counts[source_m]
    return usable_n[shuffled_m[np.argsort(place_m, kind="stable")]]
