"""Drawings: inline SVG that a stylesheet colours, that a screen reader announces, and that has a table beside it.

No colour, font or style stands in a drawing: its classes are those of static/plots.css, so that it follows dark mode and needs no
exception from the content security policy.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from service.web.formats import number
from service.web.plots.scales import Counts, Linear
from winnow.marked_text import printable

WIDTH = 420.0
"""Of every drawing, in its own units: near to the pixels of a phone, so that text stays legible there."""
_LABEL_CHARACTERS, _MOST_TICKS = 44, 7
Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with what it shows in words and as a table; `legend` has the class and the label of each colour."""

    name: str
    title: str
    description: str
    svg: Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    legend: Sequence[tuple[str, str]] = ()


class Drawing:
    """An SVG image under construction. `name` distinguishes it from the others of a page."""

    def __init__(self, name: str, title: str, description: str, height: float) -> None:
        self.height, self.description = height, description
        self._root = ET.Element(
            "svg",
            {
                "class": "plot",
                "viewBox": f"0 0 {place(WIDTH)} {place(height)}",
                "role": "img",
                "aria-labelledby": f"{name}-title {name}-desc",
            },
        )
        self.add("title", text=title, id=f"{name}-title")
        self.add("desc", text=description, id=f"{name}-desc")

    def add(self, tag: str, css: str = "", text: str | None = None, **attributes: float | str) -> ET.Element:
        """An element with its class, its text, and its attributes (`_` stands for `-`), of which numbers are rounded.

        What is no text in XML, or would reorder a line, is written out.
        """
        given = {key.replace("_", "-"): place(value) for key, value in attributes.items()}
        element = ET.SubElement(self._root, tag, {"class": css, **given} if css else given)
        element.text = None if text is None else printable(text)
        return element

    def text(self, x: float, y: float, content: str, css: str = "", anchor: Anchor = "start") -> None:
        """A line of text, cut where it is long; the whole is its tooltip."""
        shown = printable(content)
        cut = shown if len(shown) <= _LABEL_CHARACTERS else f"{shown[: _LABEL_CHARACTERS - 1]}…"
        element = self.add("text", f"label {css}".strip(), cut, x=x, y=y, text_anchor=anchor)
        if cut != shown:
            ET.SubElement(element, "title").text = shown[:500]

    def dots(self, points: Iterable[tuple[float, float]], css: str) -> None:
        """Points as one path of round caps, half a unit exact, each place drawn once: a few bytes a point."""
        parts, at = [], (0, 0)
        for y, x in sorted({(round(2 * y), round(2 * x)) for x, y in points}):
            parts.append(f"m{x - at[0]} {y - at[1]}h0")
            at = (x, y)
        if parts:
            self.add("path", f"dots {css}", d="".join(parts), transform="scale(.5)")

    def markup(self) -> Markup:
        return Markup(ET.tostring(self._root, encoding="unicode"))


def place(value: float | str) -> str:
    """A coordinate to a tenth of a unit."""
    return value if isinstance(value, str) else f"{round(value, 1) + 0.0:g}"


@dataclass(frozen=True, slots=True)
class Frame:
    """The axes of a plot: where `x` and `y` put a value, and what they are called."""

    x: Linear | Counts
    y: Linear | Counts
    x_title: str
    y_title: str

    LEFT, RIGHT, TOP, BOTTOM = 46.0, WIDTH - 10, 22.0, 38.0
    """Places of the edges; the last is the height below the axis."""

    def draw(self, drawing: Drawing, x_ticks: Sequence[tuple[float, str]] | None = None) -> None:
        """`x_ticks`: values and their labels, of which those are left out that have no room; None: round values."""
        bottom = drawing.height - self.BOTTOM
        for value in self.y.ticks():
            y = self.y(value)
            drawing.add("line", "grid", x1=self.LEFT, x2=self.RIGHT, y1=y, y2=y)
            drawing.text(self.LEFT - 6, y + 4, number(value), anchor="end")
        ticks = [(value, number(value)) for value in self.x.ticks()] if x_ticks is None else x_ticks
        for value, label in ticks[:: max(1, -(-len(ticks) // _MOST_TICKS))]:
            x = self.x(value)
            drawing.add("line", "tick", x1=x, x2=x, y1=bottom, y2=bottom + 4)
            drawing.text(x, bottom + 16, label, anchor="middle")
        drawing.add("line", "axis", x1=self.LEFT, x2=self.RIGHT, y1=bottom, y2=bottom)
        drawing.text((self.LEFT + self.RIGHT) / 2, drawing.height - 6, self.x_title, "axis-title", "middle")
        drawing.text(2, 12, self.y_title, "axis-title")
