"""Figures by name: bars in groups, and parts of a whole."""

import math
from collections.abc import Callable, Sequence

from service.web.formats import number, percent
from service.web.plots.scales import spanning
from service.web.plots.svg import WIDTH, Chart, Drawing

_BAR, _GAP, _LABEL = 13.0, 9.0, 17.0
_VALUE_WIDTH = 70.0
_PARTS = 9
"""Colours that are told apart; what is beyond is one part."""
REST = "all others"

Legend = Sequence[tuple[str, str]]
Row = tuple[str, Sequence[float | None]]


def grouped(
    name: str,
    title: str,
    rows: Sequence[Row],
    series: Legend,
    *,
    row_title: str,
    show: Callable[[float | None], str] = number,
) -> Chart:
    """A group of bars for each row, one bar a series, from a common zero; None: there is no such bar.

    Raises:
        ValueError: a row has not as many values as there are series.
    """
    for label, values in rows:
        if len(values) != len(series):
            raise ValueError(f"{label}: {len(values)} values do not fit {len(series)} series")
    group = _LABEL + len(series) * _BAR + _GAP
    every = [value for _, values in rows for value in values if value is not None]
    has_negative = any(value < 0 for value in every)
    x = spanning(every, _VALUE_WIDTH if has_negative else 0, WIDTH - _VALUE_WIDTH, with_zero=True)
    best = "; ".join(
        f"{label}: " + ", ".join(f"{name} {show(value)}" for (_, name), value in zip(series, values, strict=True))
        for label, values in rows[:3]
    )
    more = f"; and {len(rows) - 3} more" if len(rows) > 3 else ""
    drawing = Drawing(name, title, f"{best}{more}.", max(len(rows), 1) * group)
    for place, (label, values) in enumerate(rows):
        top = place * group
        drawing.text(0, top + 12, label)
        for number_of, ((css, _), value) in enumerate(zip(series, values, strict=True)):
            if value is None or not math.isfinite(value):
                continue
            y = top + _LABEL + number_of * _BAR
            left, right = sorted((x(0), x(value)))
            drawing.add("rect", f"bar {css}", x=left, y=y, width=max(right - left, 0.5), height=_BAR - 3)
            if value < 0:
                drawing.text(left - 5, y + 9, show(value), "value", "end")
            else:
                drawing.text(right + 5, y + 9, show(value), "value")
    drawing.add("line", "axis", x1=x(0), x2=x(0), y1=_LABEL - 3, y2=drawing.height - _GAP)
    table = [[label, *map(show, values)] for label, values in rows]
    columns = [row_title, *(label for _, label in series)]
    return Chart(name, title, drawing.description, drawing.markup(), columns, table, series)


def stacked(name: str, title: str, rows: Sequence[Row], parts: Sequence[str], *, row_title: str) -> Chart:
    """One bar a row, as wide as the others, of its parts' shares. Parts beyond nine, which must be the smallest, are one.

    Raises:
        ValueError: a row has not as many values as there are parts, or one of them is negative.
    """
    for label, values in rows:
        if len(values) != len(parts) or any(value is None or value < 0 for value in values):
            raise ValueError(f"{label}: needs {len(parts)} values, none negative")
    shown, group = list(parts), _LABEL + 2 * _BAR + _GAP
    if len(parts) > _PARTS:
        shown = [*parts[: _PARTS - 1], REST]
    legend = [(f"part-{place}", label) for place, label in enumerate(shown)]
    table, drawing = [], Drawing(name, title, f"Shares of {len(parts)} parts in {len(rows)} rows.", len(rows) * group)
    for place, (label, values) in enumerate(rows):
        known = [float(value or 0) for value in values]
        if len(parts) > _PARTS:
            known = [*known[: _PARTS - 1], math.fsum(known[_PARTS - 1 :])]
        whole = math.fsum(known)
        shares = [value / whole if whole else 0.0 for value in known]
        drawing.text(0, place * group + 12, label)
        left = 0.0
        for (css, _), share in zip(legend, shares, strict=True):
            width = share * WIDTH
            drawing.add("rect", f"part {css}", x=left, y=place * group + _LABEL, width=width, height=2 * _BAR - 4)
            left += width
        table.append([label, *map(percent, shares)])
    return Chart(name, title, drawing.description, drawing.markup(), [row_title, *shown], table, legend)
