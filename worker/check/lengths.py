"""How long the rows of a dataset are: quantiles over all of them, at four bytes a row."""

from array import array

import numpy as np

from service.datasets.storage import Sample
from winnow.marked_text import as_json, counts, parts_of

_QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Lengths:
    """Collects one length a row, each below 2³¹."""

    def __init__(self) -> None:
        self._values = array("i")

    def add(self, length: int) -> None:
        self._values.append(length)

    def __len__(self) -> int:
        return len(self._values)

    def summary(self) -> dict[str, int] | None:
        """The sum of all, and for each quantile the least length that so many rows do not exceed; None of no row."""
        if not self._values:
            return None
        values = np.frombuffer(self._values, np.int32)
        found = np.quantile(values, list(_QUANTILES.values()), method="inverted_cdf")
        return {"total": int(values.sum(dtype=np.int64)), **dict(zip(_QUANTILES, map(int, found), strict=True))}


def characters(sample: Sample) -> tuple[int, int]:
    """The characters of a sample, and those of them that the loss counts; calls and tools as they are in JSON."""
    if sample.messages is None:
        length = len(sample.text or "")
        return length, length
    lengths = [(sum(map(len, parts_of(message))), counts(message)) for message in sample.messages]
    whole = sum(length for length, _ in lengths) + (len(as_json(sample.tools)) if sample.tools else 0)
    return whole, sum(length for length, counted in lengths if counted)
