"""How values are distributed, in all and in parts of them."""

from collections.abc import Sequence
from itertools import pairwise

from service.web.formats import number
from service.web.plots.scales import Counts, Linear
from service.web.plots.svg import Chart, Drawing, Frame

_HEIGHT = 240.0
_LOGARITHMIC_FROM = 40
"""The largest count beside the smallest of a bar, from which on a small bar would not be seen."""

Series = tuple[str, str, Sequence[int]]
"""The class of its colour, its label, and the count of each bin."""


def histogram(
    name: str,
    title: str,
    edges: Sequence[float],
    series: Sequence[Series],
    *,
    x_title: str,
) -> Chart:
    """Bars over one another, the first series behind.

    Args:
        edges: of the bins, rising, one more than each series has counts.

    Raises:
        ValueError: a series has another number of bins.
    """
    for _, label, counts in series:
        if len(counts) != len(edges) - 1:
            raise ValueError(f"{label}: {len(counts)} counts do not fit {len(edges)} edges")
    positive = [count for _, _, counts in series for count in counts if count > 0]
    highest = max(positive, default=1)
    is_logarithmic = highest > _LOGARITHMIC_FROM * min(positive, default=1)
    bottom = _HEIGHT - Frame.BOTTOM
    frame = Frame(
        x=Linear(edges[0], edges[-1], Frame.LEFT, Frame.RIGHT),
        y=(Counts(highest, bottom, Frame.TOP) if is_logarithmic else Linear(0, highest, bottom, Frame.TOP)),
        x_title=x_title,
        y_title="samples, logarithmic" if is_logarithmic else "samples",
    )
    sums = ", ".join(f"{label} {number(sum(counts))}" for _, label, counts in series)
    drawing = Drawing(
        name, title, f"From {number(edges[0])} to {number(edges[-1])} in {len(edges) - 1} bins: {sums}.", _HEIGHT
    )
    frame.draw(drawing)
    for css, _, counts in series:
        drawing.add("path", f"bar {css}", d=_outline(frame, edges, counts))
    rows = [
        [f"{number(low)} to {number(high)}", *(number(counts[bin]) for _, _, counts in series)]
        for bin, (low, high) in enumerate(pairwise(edges))
        if any(counts[bin] for _, _, counts in series)
    ]
    columns = [x_title, *(label for _, label, _ in series)]
    return Chart(name, title, drawing.description, drawing.markup(), columns, rows, [each[:2] for each in series])


def _outline(frame: Frame, edges: Sequence[float], counts: Sequence[int]) -> str:
    """The bars as closed steps; bins with nothing have none."""
    base, parts = frame.y(0), []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            left, width = frame.x(low), frame.x(high) - frame.x(low)
            parts.append(f"M{left:.1f} {base:.1f}V{frame.y(count):.1f}h{width:.1f}V{base:.1f}z")
    return "".join(parts)
