"""A template makes messages of any row, apart from everything, in bounded time and memory."""

import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.datasets.convert import convert
from service.datasets.rows import renderer as row_renderer
from service.datasets.rows import template_process
from service.datasets.rows.canonical import canonical
from service.datasets.rows.forms import Form
from service.datasets.rows.options import RowOptions, Taken
from service.datasets.rows.renderer import rendered
from service.datasets.rows.template import Rendered
from service.datasets.storage import Content
from service.datasets.values import InvalidRow
from service.http.errors import TooLarge, Unprocessable
from service.settings import UploadSettings

CHOICE = {
    "user": "{{ q }}{% for c in choices %}\n{{ loop.index0 }}. {{ c }}{% endfor %}",
    "assistant": "{{ choices[right] }}",
}
ROW = {"q": "Sky?", "choices": ["blue", "red"], "right": 0, "subject": "colours"}
SAMPLE = '{"messages":[{"content":"Sky?\\n0. blue\\n1. red","role":"user"},{"content":"blue","role":"assistant"}]}'


def options(template: dict[str, Any], columns: str | None = None) -> RowOptions:
    return RowOptions.parse(columns=columns, template=json.dumps(template))


def results(template: dict[str, Any], *rows: dict[str, Any] | InvalidRow, **limits: Any) -> list[Rendered | InvalidRow]:
    parsed = options(template).template
    assert parsed is not None
    return [row for _, row in rendered(enumerate(rows, 1), parsed, UploadSettings(**limits))]


def made(assistant: str, row: dict[str, Any], **limits: Any) -> str:
    """What the template makes of the row, or the error of the row."""
    (found,) = results({"user": "u", "assistant": assistant}, row, **limits)
    return found.assistant if isinstance(found, Rendered) else str(found)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Content]:
    def read(data: bytes, template: dict[str, Any], columns: str | None = None) -> Content:
        (tmp_path / "upload").write_bytes(data)
        with (tmp_path / "upload").open("rb") as file:
            return convert(file, options(template, columns), UploadSettings(), tmp_path)

    return read


def test_a_file_is_rendered_whatever_brings_it(read: Callable[..., Content]) -> None:
    rows = [{**ROW, "q": f"Sky {i}?"} for i in range(600)]  # more than are rendered at once
    lines = read(b"".join(json.dumps(row).encode() + b"\n" for row in rows), CHOICE, "source:subject")
    assert (lines.row_count, lines.sources) == (600, {"colours": 600})
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows).append_column("more", [[b"x"] * 600]), table)
    for template in (CHOICE, {**CHOICE, "assistant": "{{ row.choices[row['right']] }}"}):
        assert read(table.getvalue(), template, "source:subject").fingerprint == lines.fingerprint


def test_what_a_template_reads_is_told() -> None:
    (found,) = results(CHOICE, ROW)
    assert isinstance(found, Rendered)
    sample = canonical(found, 5, options(CHOICE, "source:subject"))
    assert (sample.id, sample.source, sample.sample) == ("5", "colours", SAMPLE)
    read = (("template.q", "q"), ("template.choices", "choices"), ("template.right", "right"), ("source", "subject"))
    assert sample.taken == Taken("template", read)
    assert canonical(found, 5, options(CHOICE)).taken == Taken("template", read[:3], ("subject",))
    assert set(options(CHOICE, "source:subject").wanted or ()) >= {"q", "choices", "right", "subject"}
    assert options({**CHOICE, "user": "{{ row.q }}"}).wanted is None


def test_the_system_part_is_a_message_unless_it_is_empty() -> None:
    template = {"system": "{{ s }}", "user": "u", "assistant": "a\n"}
    one, none = results(template, {"s": "Be kind."}, {"s": ""})
    roles = [
        [message["role"] for message in json.loads(canonical(row, 0, options(template)).sample)["messages"]]
        for row in (one, none)
    ]
    assert roles == [["system", "user", "assistant"], ["user", "assistant"]]


@pytest.mark.parametrize(
    ("source", "row", "expected"),
    [
        ("{{ a }} {{ b | default('none') }}\n", {"a": "é", "b": None}, "é none\n"),
        ("{{ a }}", {"a": date(2026, 1, 31)}, "2026-01-31"),
        ("{{ row['a b'] }}", {"a b": 1}, "1"),
        ("{{ row }}", {"row": "r"}, "r"),
        ("{{ a }}", {"a": "{{ b }}<&"}, "{{ b }}<&"),
    ],
)
def test_values_are_printed_as_they_are(source: str, row: dict[str, Any], expected: str) -> None:
    assert made(source, row) == expected


@pytest.mark.parametrize(
    ("source", "row", "part"),
    [
        ("{{ b }}", {"a": 1}, "'b' is undefined"),
        ("{{ b }}", {"b": None}, "'b' is undefined"),
        ("{{ b }}", {"b": float("nan")}, "'b' is undefined"),
        ("{{ a[1] }}", {"a": [1, None]}, "null"),
        ("{{ a.b }}", {"a": {"c": 1}}, "no attribute 'b'"),
        ("{{ 1 // a }}", {"a": 0}, "zero"),
        ("{{ a.__class__ }}", {"a": "x"}, "unsafe"),
        ("{{ a.append(1) }}", {"a": []}, "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {}, "recursion"),
        ("{% include 'x' %}", {}, "loader"),
        ("{{ a * 10 ** 10 }}", {"a": "x"}, "memory"),
        ("{% for i in range(99999) %}{{ a }}{% endfor %}", {"a": "x" * 99}, "makes more than"),
    ],
)
def test_a_row_that_cannot_be_rendered_is_named_with_the_part(source: str, row: dict[str, Any], part: str) -> None:
    found = made(source, row)
    assert found.startswith("cannot be rendered: template.assistant")
    assert part in found
    assert found.isascii()


def test_the_rows_beside_a_bad_one_are_rendered() -> None:
    good, bad, unreadable, last = results(CHOICE, ROW, {"q": "é\ud800"}, InvalidRow("is not JSON"), ROW)
    assert isinstance(bad, InvalidRow)
    assert str(unreadable) == "is not JSON"
    for row in (good, last):
        assert isinstance(row, Rendered)
        assert canonical(row, 0, options(CHOICE)).sample == SAMPLE
    (broken,) = results({**CHOICE, "user": "{{ q }}"}, {**ROW, "q": "\ud800"})
    assert isinstance(broken, Rendered)
    with pytest.raises(InvalidRow, match=r"template\.user contains a lone surrogate"):
        canonical(broken, 0, options(CHOICE))


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_ended() -> None:
    with pytest.raises(TooLarge) as error:
        made(LOOP, {}, base_seconds=1)
    assert (error.value.param, error.value.problem_code) == ("template", "upload_too_costly")


def test_one_that_gets_no_processor_is_ended_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_renderer, "_PATIENCE", 0.01)
    with pytest.raises(TooLarge) as error:
        made(LOOP, {}, base_seconds=100)
    assert (error.value.param, error.value.problem_code) == ("template", "upload_too_costly")


def test_small_rows_do_not_become_a_large_file() -> None:
    with pytest.raises(TooLarge) as error:
        results({"user": "u", "assistant": "x" * 2_000}, *[{"a": 1}] * 10, free_expansion_bytes=1_000)
    assert (error.value.param, error.value.problem_code) == ("template", "upload_too_large")


def test_a_row_may_not_be_longer_than_others_when_it_is_rendered(tmp_path: Path) -> None:
    (tmp_path / "upload").write_text('{"a": 1}\n')
    for length, fits in ((900, True), (1_000, False)):
        template = options({"user": "u", "assistant": "x" * length})
        with (tmp_path / "upload").open("rb") as file, nullcontext() if fits else pytest.raises(Unprocessable):
            convert(file, template, UploadSettings(max_row_bytes=1_000), tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "a",
        "[]",
        "{}",
        '{"user": "a"}',
        '{"user": "a", "assistant": 1}',
        '{"user": "a", "assistant": "b", "tool": "c"}',
        '{"user": "{{", "assistant": "b"}',
        json.dumps({"user": "{{" + "(" * 8_000 + "a" + ")" * 8_000 + "}}", "assistant": "b"}),
        json.dumps({"user": "a" * 20_000, "assistant": "b"}),
    ],
)
def test_a_template_that_is_none_is_refused_at_once(template: str) -> None:
    with pytest.raises(Unprocessable) as error:
        RowOptions.parse(template=template)
    assert error.value.param == "template"


def test_a_template_is_not_computed_where_it_is_parsed() -> None:
    options({"user": "{{ 'a' * 10 ** 12 }}", "assistant": "{{ 10 ** (10 ** 10) }}"})


@pytest.mark.parametrize("source", ["{{ a | no_such_filter }}", "{{ a is no_such_test }}"])
def test_a_template_that_does_not_compile_is_refused(source: str) -> None:
    with pytest.raises(Unprocessable) as error:
        made(source, {"a": 1})
    assert error.value.param == "template"


def test_a_template_makes_its_own_form_and_columns() -> None:
    template = json.dumps(CHOICE)
    for form, columns, param in ((Form.TEXT, None, "format"), (Form.AUTO, "prompt:q", "columns")):
        with pytest.raises(Unprocessable) as error:
            RowOptions.parse(form, columns, template)
        assert error.value.param == param


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(1)",
        "print('{}', flush=True); raise SystemExit(0)",
        "print('{}', flush=True); input(); input(); input(); print('[]', flush=True); import time; time.sleep(60)",
        "print('{}', flush=True); import sys; sys.stdin.read(20); print('x' * 8_000_000, flush=True)",
        "import time; time.sleep(60)",
    ],
)
def test_a_process_that_was_taken_over_is_not_believed(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken.py").write_text(program)
    monkeypatch.setattr(row_renderer, "_PROCESS", tmp_path / "taken.py")
    monkeypatch.setattr(row_renderer, "_END_SECONDS", 0.1)
    monkeypatch.setattr(row_renderer, "_PATIENCE", 0.2)
    with pytest.raises((Unprocessable, TooLarge)) as error:
        made("{{ a }}", {"a": "x" * 2**19})
    assert error.value.param == "template"


def test_the_process_has_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "looks.py").write_text(
        "import json, os, sys\n"
        "try: import service\n"
        "except ImportError: service = ''\n"
        "print('{}', flush=True); [input() for _ in range(3)]\n"
        "print(json.dumps({'user': str(service), 'assistant': ' '.join(os.environ)}), flush=True)\n"
    )
    monkeypatch.setattr(row_renderer, "_PROCESS", tmp_path / "looks.py")
    (found,) = results(CHOICE, ROW)
    assert isinstance(found, Rendered)
    assert set(found.assistant.split()) <= {"LC_CTYPE"}  # which Python sets by itself
    assert "from service" not in Path(template_process.__file__).read_text()
