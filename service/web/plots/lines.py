"""Figures that follow another: means by bins, and a curve."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.web.formats import number
from service.web.plots.scales import Counts, Linear, spanning
from service.web.plots.svg import Chart, Drawing, Frame

_HEIGHT = 240.0

Means = Sequence[float | None]
Series = tuple[str, str, Means]
"""The class of its colour, its label, and the figure of each bin; None: there is none."""


def steps(
    name: str,
    title: str,
    edges: Sequence[float],
    series: Sequence[Series],
    counts: Sequence[tuple[str, Sequence[int]]],
    *,
    x_title: str,
    y_title: str,
) -> Chart:
    """A line across each bin for each series. Bins are drawn equally wide, whatever their edges; the table has the counts, too.

    Raises:
        ValueError: a series or a count has another number of bins.
    """
    bins = range(len(edges) - 1)
    for label, values in (*((label, values) for _, label, values in series), *counts):
        if len(values) != len(bins):
            raise ValueError(f"{label}: {len(values)} values do not fit {len(edges)} edges")
    known = [value for _, _, values in series for value in values if value is not None]
    bottom = _HEIGHT - Frame.BOTTOM
    places = Linear(0, max(len(bins), 1), Frame.LEFT, Frame.RIGHT)
    frame = Frame(places, spanning(known, bottom - 4, Frame.TOP + 4), x_title, y_title)
    drawing = Drawing(name, title, f"{y_title} in {len(bins)} ranges of {x_title}.", _HEIGHT)
    frame.draw(drawing, [(float(place), number(edge)) for place, edge in enumerate(edges)])
    for css, _, values in series:
        drawn = [(bin, value) for bin, value in enumerate(values) if value is not None]
        parts = [f"M{places(bin):.1f} {frame.y(value):.1f}H{places(bin + 1):.1f}" for bin, value in drawn]
        if parts:
            drawing.add("path", f"line {css}", d="".join(parts))
    rows = [
        [
            f"{number(edges[bin])} to {number(edges[bin + 1])}",
            *(number(values[bin]) for _, values in counts),
            *(number(values[bin]) for _, _, values in series),
        ]
        for bin in bins
    ]
    columns = [x_title, *(label for label, _ in counts), *(label for _, label, _ in series)]
    return Chart(name, title, drawing.description, drawing.markup(), columns, rows, [each[:2] for each in series])


@dataclass(frozen=True, slots=True)
class Curve:
    """`places` are those of the points along x, for the script that moves the marker."""

    chart: Chart
    places: list[float]


def curve(
    name: str, title: str, x: Sequence[int], y: Sequence[float], *, x_title: str, y_title: str, marked: int
) -> Curve:
    """A line through the points over counts, of which there is at least one and the last is the largest; and an upright line at
    the place `marked`, which the page moves."""
    bottom = _HEIGHT - Frame.BOTTOM
    frame = Frame(
        x=Counts(x[-1], Frame.LEFT, Frame.RIGHT),
        y=spanning(list(y), bottom - 4, Frame.TOP + 4),
        x_title=x_title,
        y_title=y_title,
    )
    drawing = Drawing(name, title, f"{y_title} at {number(x[0])} to {number(x[-1])} {x_title}.", _HEIGHT)
    frame.draw(drawing)
    places = [round(frame.x(value), 1) for value in x]
    points = " ".join(f"{place:g} {frame.y(value):.1f}" for place, value in zip(places, y, strict=True))
    drawing.add("path", "line selected", d=f"M{points}")
    drawing.add("line", "marker", x1=places[marked], x2=places[marked], y1=Frame.TOP, y2=bottom)
    rows = [[number(count), number(value)] for count, value in zip(x, y, strict=True)]
    chart = Chart(name, title, drawing.description, drawing.markup(), [x_title, y_title], rows)
    return Curve(chart, places)
