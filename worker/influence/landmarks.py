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
    usable: IntArray, *, choice: Choice, seed: int, sources: Sequence[str | None] | None = None
) -> IntArray:
    """A permutation of the usable samples (n,), int64, from the seed; the first l of it are l landmarks.

    choice: `uniform`, every order as likely as any other; `stratified`, each prefix holds every source in its share of the
    usable samples, to within one or two, and is uniform within a source.
    usable: int64 (n,), rising indices into the pool.  sources: (n,), of each usable sample; samples without one are a
    source of their own. `uniform` does not look at them.
    Raises ValueError for an unknown choice, and where `stratified` has no sources or not one for each sample.
    """
    generator = seeded_generator(seed, "landmarks")
    shuffled = generator.permutation(len(usable))
    if choice == "uniform":
        return usable[shuffled]
    if choice != "stratified":
        raise ValueError(f"choice must be uniform or stratified, not {choice!r}")
    if sources is None or len(sources) != len(usable):
        given = "none are given" if sources is None else f"there are {len(sources)}"
        raise ValueError(f"stratified landmarks need a source for each of the {len(usable)} usable samples: {given}")
    numbers: dict[str | None, int] = {}
    source = np.array([numbers.setdefault(name, len(numbers)) for name in sources], dtype=np.int64)[shuffled]
    # The j-th of a source's samples comes at (j + u) / count of the way: sources are laid out evenly beside each other.
    counts = np.bincount(source, minlength=len(numbers))
    grouped = np.argsort(source, kind="stable")
    rank = np.empty(len(usable))
    rank[grouped] = np.arange(len(usable)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = (rank + generator.random(len(numbers))[source]) / counts[source]
    return usable[shuffled[np.argsort(place, kind="stable")]]
