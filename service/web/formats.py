"""How figures, times and texts are written on pages."""

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from math import isfinite, log2
from typing import Any

from markupsafe import Markup, escape

_CODE = re.compile(r"`([^`]+)`")
_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
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
    figure, _, power = f"{count:.1e}".partition("e")
    return f"{figure} × 10{power.lstrip('+0').translate(_RAISED)}" if count >= 1e6 else f"{count:,.0f}"


def moment(at: datetime | None) -> str:
    return _NONE if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def shortened(text: str, most: int) -> str:
    """The beginning of a text that is longer."""
    return text if len(text) <= most else f"{text[:most]}…"


def words(code: str) -> str:
    """A code of the API as people read it."""
    return code.replace("_", " ").replace(".", " ")


def described(text: str) -> Markup:
    """A description with `code` in it."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))


def points(values: Sequence[float], width: float, height: float) -> str:
    """A line through the values, from left to right, as the points of a polyline; what is not finite is left out."""
    known = [(place, value) for place, value in enumerate(values) if isfinite(value)]
    low, high = min((value for _, value in known), default=0.0), max((value for _, value in known), default=1.0)
    across, up = width / max(1, len(values) - 1), height / ((high - low) or 1.0)
    return " ".join(f"{place * across:.1f},{height - (value - low) * up:.1f}" for place, value in known)


def marked(
    text: str, spans: Sequence[tuple[int, int]], kept: tuple[int, int] | None, most: int
) -> list[tuple[str, str]]:
    """The first `most` characters in pieces, each with its class: `counted` by the loss, `cut` off, or neither (""). Places are
    in characters of the text; None for `kept`: nothing is."""
    begin, end = kept or (0, 0)
    edges = {0, min(most, len(text)), begin, end, *(place for span in spans for place in span)}
    places = sorted(place for place in edges if place <= min(most, len(text)))

    def kind(place: int) -> str:
        if not begin <= place < end:
            return "cut"
        return "counted" if any(first <= place < last for first, last in spans) else ""

    return [(kind(first), text[first:last]) for first, last in pairwise(places)]


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


FILTERS: dict[str, Callable[..., Any]] = {
    "number": number,
    "percent": percent,
    "duration": duration,
    "age": age,
    "size": size,
    "operations": operations,
    "moment": moment,
    "shortened": shortened,
    "words": words,
    "described": described,
    "as_json": as_json,
    "marked": marked,
    "points": points,
}
