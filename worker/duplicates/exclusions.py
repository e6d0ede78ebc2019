"""Rows of the pool that the options `duplicates` and `overlap` leave out of the job."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from service.storage.artifacts import ArtifactStore
from worker.duplicates.repeats import Repeats

REASONS = ("duplicate", "overlap")
"""Why a row was left out; numbered from 1 on."""

Numbers = npt.NDArray[np.uint8]


def excluded(
    parameters: Mapping[str, Any], usable: npt.NDArray[np.bool_], duplicates: Repeats, overlap: Repeats
) -> Numbers:
    """The number of the reason for which each usable row is left out, 0 where it is not, uint8 (n,).

    Of duplicates the first one stays that can be used and does not repeat the target, where that is left out.
    """
    numbers = np.zeros(len(usable), np.uint8)
    if parameters.get("overlap") == "exclude":  # a job of an earlier version has neither
        numbers[usable & overlap.is_repeat] = REASONS.index("overlap") + 1
    if parameters.get("duplicates") == "one":
        rows = np.flatnonzero(usable & (numbers == 0))
        group = np.where(duplicates.is_repeat, duplicates.same_as, np.arange(len(usable)))
        _, first = np.unique(group[rows], return_index=True)
        numbers[np.delete(rows, first)] = REASONS.index("duplicate") + 1
    return numbers


def write(store: ArtifactStore, key: str, numbers: Numbers) -> None:
    with store.writing(key) as path, path.open("wb") as file:
        np.save(file, numbers)


def read(store: ArtifactStore, prepared: Mapping[str, Any]) -> Numbers | None:
    """Those of the job with this result of its prepare stage; None where nothing is left out."""
    found = prepared.get("exclusions")  # nor by the version before
    if found is None:
        return None
    with store.local(found["key"]) as path:
        numbers: Numbers = np.load(path)
    return numbers


def taking_part(store: ArtifactStore, prepared: Mapping[str, Any]) -> npt.NDArray[np.bool_]:
    """Which rows of the pool take part in the job, bool (n,): those that can be used and are not left out."""
    from worker.text import token_files  # which loads torch; the supervisor reads exclusions without

    usable = token_files.read_counts(store, prepared["pool_tokens"]).usable
    numbers = read(store, prepared)
    return usable if numbers is None else usable & (numbers == 0)
