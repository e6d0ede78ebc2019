"""What pages make of figures, texts and jobs."""

import json
import shlex
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.jobs.schemas import SelectionJobOut
from service.plan.parameters import JobParameters
from service.web import formats, snippets, timeline
from winnow.options import assigned, read_budget

NOW = datetime(2026, 12, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (None, "–"),
        (0.0, "0 s"),
        (0.34, "0.3 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (3_700, "1 h 1 min"),
        (3_601, "1 h"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float | None, written: str) -> None:
    assert formats.duration(seconds) == written


@pytest.mark.parametrize(
    ("count", "written"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (200 * 2**20, "200 MiB"), (2**60, "1048576 TiB")],
)
def test_sizes(count: int, written: str) -> None:
    assert formats.size(count) == written


def test_operations_are_written_to_a_power_of_ten() -> None:
    assert [formats.operations(count) for count in (None, 999_999, 5.52e9, 1e12)] == [
        "–",
        "999,999",
        "5.5 × 10⁹",
        "1.0 × 10¹²",
    ]


def test_descriptions_are_escaped_but_for_code() -> None:
    assert formats.described("<b> `a<b` &") == "&lt;b&gt; <code>a&lt;b</code> &amp;"


@pytest.mark.parametrize("most", [3, 6, 100])
def test_marked_pieces_are_the_text_with_every_character_once(most: int) -> None:
    text = "0123456789"
    pieces = formats.marked(text, [(2, 4), (7, 10)], (1, 8), most)
    assert "".join(piece for _, piece in pieces) == text[:most]
    kinds = "".join({"": ".", "counted": "#", "cut": "x"}[kind] * len(piece) for kind, piece in pieces)
    assert kinds == "x.##...#xx"[:most]


def job(stages: list[dict[str, Any]], status: str = "running", **more: Any) -> SelectionJobOut:
    usual = {
        **dict.fromkeys(SelectionJobOut.model_fields),
        "object": "selection_job",
        "id": "job_1",
        "status": status,
        "stages": stages,
        "model": {},
        "pool": "p",
        "target": "t",
        "parameters": JobParameters(),
        "metadata": {},
        "labels": {},
        "created_at": NOW,
        "started_at": NOW,
    }
    return SelectionJobOut.model_construct(**SelectionJobOut.model_validate({**usual, **more}).__dict__)


def stage(name: str, begin: float | None, end: float | None, done: int, total: int = 100) -> dict[str, Any]:
    at = [None if each is None else NOW + timedelta(seconds=each) for each in (begin, end)]
    is_done = end is not None
    return {
        "stage": name,
        "units": 1,
        "units_done": int(is_done),
        "units_reused": 0,
        "done": done,
        "total": total,
        "started_at": at[0],
        "finished_at": at[1],
        "seconds": end - begin if is_done and begin is not None else None,
    }


PLAN = {
    "stages": [
        {"stage": "prepare", "seconds": 10},
        {"stage": "embed", "seconds": 20},
        {"stage": "select", "seconds": 5},
    ]
}


def test_what_is_left_is_by_the_pace_of_what_runs_and_the_plan_of_what_is_to_come() -> None:
    running = job([stage("prepare", 0, 12, 100), stage("embed", 12, None, 25)])
    found = timeline.of_job(running, PLAN, NOW + timedelta(seconds=22))
    assert [(step.stage, step.state) for step in found.steps] == [
        ("prepare", "done"),
        ("embed", "running"),
        ("select", "to come"),
    ]
    assert [step.spent for step in found.steps] == [12, 10, None]
    assert found.seconds_left == pytest.approx(30 + 5)  # 10 seconds for a quarter
    assert timeline.of_job(running, None, NOW + timedelta(seconds=22)).seconds_left is None


def test_bars_are_within_the_whole_and_stages_to_come_follow() -> None:
    running = job([stage("prepare", 0, 12, 100), stage("embed", 12, None, 25)])
    steps = timeline.of_job(running, PLAN, NOW + timedelta(seconds=22)).steps
    for step in steps:
        for begin, length in (step.place, step.planned_place):
            assert 0 <= begin <= begin + length <= 1 + 1e-9
    assert steps[2].place[0] == pytest.approx(steps[1].planned_place[0] + steps[1].planned_place[1])


def test_nothing_is_left_of_a_job_that_has_ended() -> None:
    ended = job([stage("prepare", 0, 12, 100)], status="cancelled", finished_at=NOW + timedelta(seconds=13))
    found = timeline.of_job(ended, PLAN, NOW + timedelta(hours=1))
    assert (found.seconds_left, len(found.steps)) == (None, 1)
    assert found.steps[0].spent == 12


REQUEST = {
    "model": {"id": "Qwen/Qwen3-0.6B", "revision": "main"},
    "pool": "ds_1",
    "target": {"preset": "gsm8k", "count": 48},
    "budget": 0.05,
    "metadata": {"it's": "a 'quote' $HOME `id`\nline", "a.b=c": "d"},
    "landmarks": {"count": 8},
    "template_arguments": {"enable_thinking": False},
    "warmup": {"lora": {}},
}


def test_snippets_make_the_same_request() -> None:
    curl, python, command = snippets.of_request(REQUEST, "http://127.0.0.1:8000")
    words = shlex.split(curl.text.replace("\\\n", " "))
    assert json.loads(words[words.index("-d") + 1]) == REQUEST
    made: dict[str, Any] = {}
    source = python.text.replace("from winnow.client import Winnow\n", "").replace("import os\n", "")
    exec(source, {"os": Environment, "Winnow": lambda *_: Recorded(made)})
    assert made == REQUEST
    words = shlex.split(command.text.replace("\\\n", " ").split("\n", 1)[1])
    assert words[:4] == ["winnow", "submit", "ds_1", "preset:gsm8k"]
    options = dict(zip(words[4:8:2], words[5:8:2], strict=True))
    settings = words[9::2]
    assert options["--model"] == "Qwen/Qwen3-0.6B"
    assert assigned(settings, {"pool": words[2], "budget": read_budget(options["--budget"])}) == REQUEST
    for snippet in (curl, python, command):
        assert "wnw_" not in snippet.text


class Environment:
    environ = {"WINNOW_API_KEY": "x"}  # noqa: RUF012


class Recorded:
    def __init__(self, made: dict[str, Any]) -> None:
        self._made = made

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(self, *_: object) -> None: ...

    def create_job(self, **request: Any) -> None:
        self._made.update(request)
