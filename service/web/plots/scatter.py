"""Pairs of values: a figure against another, or places on a map."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from service.web.formats import number
from service.web.plots.scales import Linear, spanning
from service.web.plots.svg import WIDTH, Chart, Drawing, Frame

_HEIGHT, _MAP_HEIGHT, _MARGIN = 300.0, 380.0, 10.0
_CELL = 7.0
"""Side of the squares that points are counted in; how many share one decides on their colour."""
_DENSITIES = (2, 5, 12)
_TABLE_ROWS = 10

Values = Sequence[float]


def against(
    name: str, title: str, x: Values, y: Values, *, x_title: str, y_title: str, css: str = "", has_diagonal: bool = True
) -> Chart:
    """`y` over `x`, points in crowds darker; the table has the tenths of `x`, from the lowest.

    Args:
        css: one class for all points, in place of those by density.
        has_diagonal: both have one scale, and where they are equal there is a line.

    Raises:
        ValueError: not as many of one as of the other.
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values of x do not fit {len(y)} of y")
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    bottom = _HEIGHT - Frame.BOTTOM
    across = spanning(first + second if has_diagonal else first, Frame.LEFT + 6, Frame.RIGHT - 6)
    up = spanning(first + second if has_diagonal else second, bottom - 6, Frame.TOP + 6)
    frame = Frame(across, up, x_title, y_title)
    description = f"{number(len(pairs))} points: {y_title} over {x_title}."
    drawing = Drawing(name, title, description, _HEIGHT)
    frame.draw(drawing)
    if has_diagonal and pairs:
        low, high = across.low, across.high
        drawing.add("line", "diagonal", x1=frame.x(low), y1=frame.y(low), x2=frame.x(high), y2=frame.y(high))
    places = [(frame.x(a), frame.y(b)) for a, b in pairs]
    if css:
        drawing.dots(places, css)
    else:
        for level, group in enumerate(_by_density(places)):
            drawing.dots(group, f"density-{level}")
    columns = ["samples", x_title, f"{y_title}, mean", "lowest", "highest"]
    return Chart(name, title, description, drawing.markup(), columns, _tenths(pairs))


def _by_density(places: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The places in groups, those in the emptiest squares first."""
    cells = [(int(x // _CELL), int(y // _CELL)) for x, y in places]
    crowd = Counter(cells)
    groups: list[list[tuple[float, float]]] = [[] for _ in range(len(_DENSITIES) + 1)]
    for place, cell in zip(places, cells, strict=True):
        groups[sum(crowd[cell] > most for most in _DENSITIES)].append(place)
    return groups


def _tenths(pairs: list[tuple[float, float]]) -> list[list[str]]:
    rows, ordered = [], sorted(pairs)
    count = min(_TABLE_ROWS, len(ordered))
    for part in range(count):
        group = ordered[part * len(ordered) // count : (part + 1) * len(ordered) // count]
        values = [b for _, b in group]
        mean = math.fsum(values) / len(values)
        span = f"{number(group[0][0])} to {number(group[-1][0])}"
        rows.append([number(len(group)), span, number(mean), number(min(values)), number(max(values))])
    return rows


@dataclass(frozen=True, slots=True)
class MapPoint:
    """A sample's place, and what is known of it."""

    x: float
    y: float
    index: int
    influence: float | None
    is_selected: bool


@dataclass(frozen=True, slots=True)
class Map:
    """`targets` are for the script that finds the sample under the pointer: [x, y] in the drawing's units, index, influence."""

    chart: Chart
    targets: list[list[float | int | None]]


def sample_map(name: str, title: str, points: Sequence[MapPoint], levels: int = 5) -> Map:
    """Samples near one another where they are alike, coloured by the fifth of the points that their influence is in; the selected
    are ringed. The table has the most influential ones, whose first column is their index.
    """
    spans = [
        spanning([getattr(point, axis) for point in points], start, stop)
        for axis, start, stop in (("x", _MARGIN, WIDTH - _MARGIN), ("y", _MAP_HEIGHT - _MARGIN, _MARGIN))
    ]
    scale = max(
        (span.high - span.low) / abs(span.stop - span.start) for span in spans
    )  # one for both, so that far is far
    x, y = (_widened(span, scale) for span in spans)
    places = [(x(point.x), y(point.y)) for point in points]
    known = sorted(point.influence for point in points if point.influence is not None)
    chosen = sum(point.is_selected for point in points)
    description = f"{number(len(points))} samples, {number(chosen)} of them selected."
    drawing = Drawing(name, title, description, _MAP_HEIGHT)
    groups: dict[int, list[tuple[float, float]]] = {}
    for point, place in zip(points, places, strict=True):
        groups.setdefault(_level(known, point.influence, levels), []).append(place)
    for level in sorted(groups):
        drawing.dots(groups[level], "level-none" if level < 0 else f"level-{level}")
    rings = [place for point, place in zip(points, places, strict=True) if point.is_selected]
    drawing.dots(rings, "ring")
    drawing.dots(rings, "ringed")
    first = sorted(points, key=lambda point: -math.inf if point.influence is None else point.influence, reverse=True)
    rows = [
        [str(point.index), number(point.influence), "yes" if point.is_selected else "no"]
        for point in first[: 2 * _TABLE_ROWS]
    ]
    legend = [("level-0", "lowest fifth of influence"), (f"level-{levels - 1}", "highest fifth"), ("ring", "selected")]
    chart = Chart(name, title, description, drawing.markup(), ["sample", "influence", "selected"], rows, legend)
    found: list[list[float | int | None]] = [
        [round(place[0], 1), round(place[1], 1), point.index, point.influence]
        for point, place in zip(points, places, strict=True)
    ]
    return Map(chart, found)


def _widened(span: Linear, scale: float) -> Linear:
    middle, half = (span.low + span.high) / 2, scale * abs(span.stop - span.start) / 2
    return Linear(middle - half, middle + half, span.start, span.stop)


def _level(known: list[float], influence: float | None, levels: int) -> int:
    """Which of as many equal parts of the known values it is in; -1 where there is no value."""
    if influence is None:
        return -1
    return min(levels - 1, bisect_left(known, influence) * levels // len(known))
