"""How figures, times and texts are written on pages."""

from collections.abc import Callable
from datetime import UTC, datetime
from math import log2
from typing import Any

_NONE = "–"
_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))


def number(value: float | None, digits: int = 3) -> str:
    """With separators; fractions with so many significant digits."""
    if value is None:
        return _NONE
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    written = f"{value:.{digits}g}"
    return f"{value:,.0f}" if "e+" in written else written


def percent(share: float | None) -> str:
    return _NONE if share is None else f"{share:.1%}"


def duration(seconds: float | None) -> str:
    """In the two largest units: `1 h 5 min`; below ten seconds to a tenth."""
    if seconds is None:
        return _NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.05 else "0 s"
    left, written = round(seconds), list[str]()
    for unit, size in _UNITS:
        if left >= size and len(written) < 2:
            written.append(f"{left // size} {unit}")
            left %= size
        elif written:
            break
    return " ".join(written)


def age(since: datetime | None, now: datetime | None = None) -> str:
    """Coarse, so that an open page changes seldom for it."""
    if since is None:
        return _NONE
    seconds = ((now or datetime.now(UTC)) - since).total_seconds()
    if seconds < 60:
        return "just now"
    unit, size = next((unit, size) for unit, size in _UNITS if seconds >= size)
    return f"{seconds // size:.0f} {unit} ago"


def size(count: float | None) -> str:
    """Bytes."""
    if count is None:
        return _NONE
    power = min(4, int(log2(count) // 10)) if count >= 1 else 0
    scaled = count / 1024**power
    digits = 1 if power and scaled < 100 else 0
    return f"{scaled:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def operations(count: float | None) -> str:
    """Floating-point operations, to a power of ten."""
    if count is None:
        return _NONE
    return f"{count:.1e}".replace("e+", " × 10^") if count >= 1e6 else f"{count:,.0f}"


def moment(at: datetime | None) -> str:
    return _NONE if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def shortened(text: str, most: int) -> str:
    """The beginning of a text that is longer."""
    return text if len(text) <= most else f"{text[:most]}…"


FILTERS: dict[str, Callable[..., Any]] = {
    "number": number,
    "percent": percent,
    "duration": duration,
    "age": age,
    "size": size,
    "operations": operations,
    "moment": moment,
    "shortened": shortened,
}
