"""From values to places of a drawing."""

import math
from dataclasses import dataclass

_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True, slots=True)
class Linear:
    """Values `low` to `high` lie at `start` to `stop`; `high` > `low`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values within the scale, at most `most`, with equal steps."""
        rough = (self.high - self.low) / most
        unit: float = 10.0 ** math.floor(math.log10(rough))
        steps = (factor * unit for factor in (*_STEPS, 20, 50))
        for step in steps:
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            if last - first < most:
                return [number * step + 0.0 for number in range(first, last + 1)]
        raise AssertionError("one of the steps is large enough")


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts 0 to `high` >= 1, by the logarithm of one more, so that nothing has a place too."""

    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + math.log1p(value) / math.log1p(self.high) * (self.stop - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """0 and powers of ten, at most `most`."""
        exponents = range(int(math.log10(self.high)) + 1)
        stride = -(-len(exponents) // (most - 1))
        return [0.0, *(10.0**exponent for exponent in exponents[::stride])]


def spanning(values: list[float], start: float, stop: float, *, with_zero: bool = False) -> Linear:
    """A linear scale of all values; of a single one, or none, one around it."""
    known = [value for value in values if math.isfinite(value)] + ([0.0] if with_zero else [])
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if low == high:
        pad = abs(low) / 2 or 0.5
        low, high = (low - pad, high + pad) if not with_zero or low == 0 else (min(low, 0.0), max(high, 0.0))
    return Linear(low, high, start, stop)
