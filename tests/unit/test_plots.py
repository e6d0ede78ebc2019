"""Drawings of a result: the right places, text of users as text, nothing inline that the content security policy refuses."""

import math
import random
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.web.plots.bars import REST, grouped, stacked
from service.web.plots.histogram import histogram
from service.web.plots.lines import curve, steps
from service.web.plots.scales import Counts, Linear, spanning
from service.web.plots.scatter import MapPoint, against, sample_map
from service.web.plots.svg import WIDTH, Chart
from winnow.marked_text import printable

HOSTILE = "</title><script>alert(1)</script>\"'&\u202egnp.exe\u0000" + "x" * 5_000
values = st.floats(-1e6, 1e6).map(lambda value: round(value, 6))


def points(count: int, seed: int = 1) -> tuple[list[float], list[float]]:
    draw = random.Random(seed)
    x = [draw.gauss(0, 1) for _ in range(count)]
    return x, [value + draw.gauss(0, 0.3) for value in x]


def a_map(count: int) -> list[MapPoint]:
    x, y = points(count)
    return [
        MapPoint(a, b, index, a if index % 7 else None, index % 9 == 0)
        for index, (a, b) in enumerate(zip(x, y, strict=True))
    ]


CHARTS = {
    "histogram": lambda: histogram(
        "h", HOSTILE, [0.0, 0.5, 1.0], [("all", HOSTILE, [90_000, 3]), ("selected", "b", [0, 3])], x_title="x"
    ),
    "empty histogram": lambda: histogram("h", "t", [0.0, 1.0], [("all", "a", [0])], x_title="x"),
    "against": lambda: against("s", HOSTILE, *points(300), x_title=HOSTILE, y_title=HOSTILE),
    "against nothing": lambda: against("s", "t", [], [], x_title="x", y_title="y"),
    "against one": lambda: against("s", "t", [3.0], [3.0], x_title="x", y_title="y", has_diagonal=False),
    "map": lambda: sample_map("m", HOSTILE, a_map(300)).chart,
    "map of nothing": lambda: sample_map("m", "t", []).chart,
    "grouped": lambda: grouped(
        "g", "t", [(HOSTILE, [1.0, -2.0]), ("b", [None, 0.0])], [("a", HOSTILE), ("b", "b")], row_title=HOSTILE
    ),
    "grouped nothing": lambda: grouped("g", "t", [], [("a", "a")], row_title="row"),
    "stacked": lambda: stacked(
        "k", "t", [(HOSTILE, [1.0, 2.0]), ("none", [0.0, 0.0])], [HOSTILE, "b"], row_title="row"
    ),
    "steps": lambda: steps(
        "p", "t", [1, 2, 4], [("all", HOSTILE, [0.5, None])], [("samples", [5, 0])], x_title=HOSTILE, y_title="y"
    ),
    "curve": lambda: curve("c", "t", [1, 10, 100_000], [0.9, 0.4, 0.1], x_title="x", y_title=HOSTILE, marked=1).chart,
    "curve of one": lambda: curve("c", "t", [1], [0.9], x_title="x", y_title="y", marked=0).chart,
}


def numbers_of(chart: Chart, css: str, name: str) -> list[float]:
    found = ET.fromstring(chart.svg).iter()
    return [float(each.attrib[name]) for each in found if css in each.attrib.get("class", "").split()]


def dots_of(chart: Chart, css: str) -> list[tuple[float, float]]:
    """Where the dots are that a path of relative moves draws, in the drawing's units."""
    (path,) = (each for each in ET.fromstring(chart.svg) if each.attrib.get("class") == f"dots {css}")
    x = y = 0
    places = []
    for dx, dy in re.findall(r"m(-?\d+) (-?\d+)h0", path.attrib["d"]):
        x, y = x + int(dx), y + int(dy)
        places.append((x / 2, y / 2))
    return places


@pytest.mark.parametrize("name", CHARTS)
def test_a_drawing_is_announced_and_has_a_table_and_nothing_inline(name: str) -> None:
    chart = CHARTS[name]()
    root = ET.fromstring(chart.svg)  # well-formed, so that nothing of a label has become markup
    assert {each.tag for each in root.iter()} <= {"svg", "title", "desc", "text", "line", "rect", "path"}
    assert root.attrib["role"] == "img"
    named = {each.attrib["id"]: each.text for each in root if "id" in each.attrib}
    assert [named[id] for id in root.attrib["aria-labelledby"].split()] == [
        printable(chart.title),
        printable(chart.description),
    ]
    assert not {"style", "fill", "stroke"} & {key for each in root.iter() for key in each.attrib}
    assert all(len(row) == len(chart.columns) for row in chart.rows)
    drawn = list(root.iter("text"))
    assert all(len(each.text or "") < 60 and "\u202e" not in (each.text or "") for each in drawn)


@pytest.mark.parametrize("name", CHARTS)
def test_everything_lies_within_the_drawing(name: str) -> None:
    root = ET.fromstring(CHARTS[name]().svg)
    height = float(root.attrib["viewBox"].split()[3])
    for each in root.iter():
        for key, most in (("x", WIDTH), ("x1", WIDTH), ("x2", WIDTH), ("y", height), ("y1", height), ("y2", height)):
            assert 0 <= float(each.attrib.get(key, 0)) <= most, ET.tostring(each)
        for corner, side, most in (("x", "width", WIDTH), ("y", "height", height)):
            assert float(each.attrib.get(corner, 0)) + float(each.attrib.get(side, 0)) <= most + 0.2


@given(st.tuples(values, values).filter(lambda pair: pair[0] < pair[1]), st.integers(2, 9))
def test_ticks_are_few_round_and_within_the_scale(bounds: tuple[float, float], most: int) -> None:
    low, high = bounds
    ticks = Linear(low, high, 0, 100).ticks(most)
    assert 1 <= len(ticks) <= most
    margin = 1e-6 * (high - low)
    assert all(low - margin <= tick <= high + margin for tick in ticks)
    steps = [b - a for a, b in pairwise(ticks)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) for step in steps)


@given(st.lists(values))
def test_a_scale_spans_its_values(found: list[float]) -> None:
    scale = spanning(found, 10, 90)
    assert scale.low < scale.high
    assert all(10 - 1e-6 <= scale(value) <= 90 + 1e-6 for value in found)


@given(st.integers(1, 10**9))
def test_the_scale_of_counts_has_a_place_for_none_and_rises(high: int) -> None:
    scale = Counts(high, 0, 100)
    ticks = scale.ticks()
    assert (scale(0), scale(high)) == (0, pytest.approx(100))
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 5
    assert ticks[-1] <= high
    places = [scale(tick) for tick in ticks]
    assert places == sorted(places)


def test_bars_of_a_histogram_are_as_high_as_their_counts() -> None:
    chart = histogram("h", "t", [0, 1, 2, 3], [("all", "all", [10, 0, 40])], x_title="x")
    (path,) = (each.attrib["d"] for each in ET.fromstring(chart.svg) if each.attrib.get("class") == "bar all")
    bars = re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)h([\d.]+)", path)
    heights = [float(base) - float(top) for _, base, top, _ in bars]
    assert heights == pytest.approx([heights[1] / 4, heights[1]], abs=0.1)  # and none for the bin with nothing
    assert [row[0] for row in chart.rows] == ["0 to 1", "2 to 3"]


def test_a_histogram_of_very_different_counts_is_logarithmic_and_says_so() -> None:
    plain = histogram("h", "t", [0, 1, 2], [("all", "all", [30, 1])], x_title="x")
    steep = histogram("h", "t", [0, 1, 2], [("all", "all", [900_000, 1])], x_title="x")
    assert "logarithmic" not in plain.svg
    assert "logarithmic" in steep.svg
    with pytest.raises(ValueError, match="do not fit"):
        histogram("h", "t", [0, 1, 2], [("all", "all", [1])], x_title="x")


def test_equal_pairs_lie_on_the_diagonal() -> None:
    x, _ = points(40)
    chart = against("s", "t", x, x, x_title="x", y_title="y")
    x1, y1, x2, y2 = (numbers_of(chart, "diagonal", name)[0] for name in ("x1", "y1", "x2", "y2"))
    for a, b in dots_of(chart, "density-0"):
        assert (a - x1) / (x2 - x1) == pytest.approx((b - y1) / (y2 - y1), abs=0.01)


def test_crowds_are_darker_and_no_place_is_lost() -> None:
    chart = against("s", "t", [0.0, *[1.0 + i / 10_000 for i in range(40)], 2.0], [1.0] * 42, x_title="x", y_title="y")
    assert len(dots_of(chart, "density-0")) == 2
    assert dots_of(chart, "density-3")
    assert sum(int(row[0]) for row in chart.rows) == 42


def test_pairs_without_a_value_are_left_out() -> None:
    chart = against("s", "t", [1.0, math.nan, 2.0], [1.0, 1.0, math.inf], x_title="x", y_title="y")
    assert chart.description.startswith("1 points")


def test_two_thousand_points_weigh_little() -> None:
    assert len(against("s", "t", *points(2_000), x_title="x", y_title="y").svg) < 24_000
    assert len(sample_map("m", "t", a_map(2_000)).chart.svg) < 28_000


def test_a_map_has_one_scale_for_both_directions_and_finds_each_sample() -> None:
    corners = [MapPoint(0, 0, 5, 0.1, False), MapPoint(4, 0, 6, 0.2, False), MapPoint(4, 1, 7, 0.9, True)]
    found = sample_map("m", "t", corners)
    (ax, ay, *_), (bx, by, *_), (cx, cy, *rest) = found.targets
    assert rest == [7, 0.9]
    assert ay == by
    assert (bx - ax) == pytest.approx(4 * (by - cy), abs=0.3)
    assert bx == cx
    assert found.chart.rows[0] == ["7", "0.9", "yes"]
    assert dots_of(found.chart, "ring") == [(round(2 * cx) / 2, round(2 * cy) / 2)]


def test_the_levels_of_a_map_are_fifths_of_what_is_known() -> None:
    found = [MapPoint(i, i % 10, i, float(i), False) for i in range(100)] + [MapPoint(0, 5, 100, None, False)]
    chart = sample_map("m", "t", found).chart
    assert [len(dots_of(chart, f"level-{level}")) for level in range(5)] == [20] * 5
    assert len(dots_of(chart, "level-none")) == 1


def test_bars_start_at_a_common_zero() -> None:
    rows = [("loss", [-2.0, -1.0]), ("gain", [1.0, None])]
    chart = grouped("g", "t", rows, [("a", "selection"), ("b", "random")], row_title="what")
    zero = numbers_of(chart, "axis", "x1")[0]
    lefts, widths = numbers_of(chart, "a", "x"), numbers_of(chart, "a", "width")
    assert lefts[0] + widths[0] == pytest.approx(zero, abs=0.11)
    assert lefts[1] == pytest.approx(zero, abs=0.11)
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.11)
    assert len(numbers_of(chart, "b", "x")) == 1
    with pytest.raises(ValueError, match="do not fit"):
        grouped("g", "t", [("loss", [1.0])], [("a", "a"), ("b", "b")], row_title="what")


def test_stacked_parts_fill_the_bar_and_small_ones_are_one() -> None:
    parts = [f"source {i}" for i in range(12)]
    chart = stacked("k", "t", [("pool", [float(12 - i) for i in range(12)])], parts, row_title="of")
    widths = numbers_of(chart, "part", "width")
    assert len(widths) == 9
    assert sum(widths) == pytest.approx(WIDTH, abs=0.5)
    assert widths[0] / WIDTH == pytest.approx(12 / 78, abs=0.001)
    assert widths[-1] / WIDTH == pytest.approx(10 / 78, abs=0.001)
    assert chart.columns[-1] == REST
    with pytest.raises(ValueError, match="none negative"):
        stacked("k", "t", [("pool", [1.0, -1.0])], ["a", "b"], row_title="of")


def test_steps_are_as_high_as_their_means() -> None:
    series = [("all", "all", [1.0, None, 3.0]), ("selected", "selected", [2.0, None, None])]
    chart = steps("p", "t", [0, 10, 20, 40], series, [("samples", [4, 0, 2])], x_title="tokens", y_title="influence")
    paths = {each.attrib["class"]: each.attrib["d"] for each in ET.fromstring(chart.svg).iter("path")}
    every, selected = (
        [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)H", paths[f"line {css}"])] for css in ("all", "selected")
    )
    assert selected == pytest.approx([sum(every) / 2], abs=0.1)
    assert every[1] < every[0]  # higher up
    assert [list(row[1:]) for row in chart.rows] == [["4", "1", "2"], ["0", "–", "–"], ["2", "3", "–"]]
    with pytest.raises(ValueError, match="do not fit"):
        steps("p", "t", [0, 10], series, [], x_title="tokens", y_title="influence")


def test_the_marker_of_a_curve_is_at_its_point() -> None:
    found = curve("c", "t", [1, 10, 1_000_000], [0.9, 0.4, 0.1], x_title="x", y_title="y", marked=1)
    chart = found.chart
    (path,) = (each.attrib["d"] for each in ET.fromstring(chart.svg).iter("path"))
    x = [float(value) for value in re.findall(r"[\d.]+", path)][::2]
    assert numbers_of(chart, "marker", "x1") == [x[1]]
    assert x == sorted(x) == found.places
