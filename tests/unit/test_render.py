"""What the command line shows of a plan, and of a sample."""

import io
from typing import Any

import pytest
from rich.console import Console

from winnow import render


def entry(stage: str, **figures: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(("operations", "seconds", "artifact_bytes", "memory_bytes"))
    return {"stage": stage, **unknown, "already_there": 0.0, **figures}


def cost(operations: float, seconds: float | None = None) -> dict[str, Any]:
    return {"operations": operations, "paper_operations": operations / 2, "seconds": seconds}


COSTS = {
    "job": cost(2e12, 61.4),
    "rds_plus": cost(7e12, 1234.0),
    "exact_influence": cost(1.6e15),
    "authors": cost(3.14159e12),
    "warmup": None,
    "rds_plus_ratio": 3.5,
    "rds_plus_ratio_by_paper": None,
}


def test_the_cost_is_shown_beside_that_of_others() -> None:
    assert render.costs(COSTS) == [
        "By products that run, in TFLOP: this job 2, rds_plus 7, exact_influence 1,600, the authors' setting 3.142."
        " rds_plus costs 3.5 times as much as this job.",
        "By the paper's formula, in TFLOP: this job 1, rds_plus 3.5, exact_influence 800, the authors' setting 1.571.",
        "Computing seconds: this job 61, rds_plus 1,234.",
    ]
    warm = render.costs({**COSTS, "job": cost(2e12), "rds_plus": cost(7e12), "warmup": cost(5e12)})
    assert warm[0].endswith(
        "3.142; the warm-up 5 more, whatever the way. rds_plus costs 3.5 times as much as this job."
    )
    assert len(warm) == 2, "no seconds are known"
    assert render.costs(None) == []


def test_a_plan_is_a_table_with_its_sum_and_its_sentences() -> None:
    figures = {"operations": 2.5e12, "seconds": 61.25, "artifact_bytes": 3 * 2**20, "memory_bytes": 2**31}
    planned = {
        "stages": [entry("prepare"), entry("embed", **figures, already_there=0.5)],
        "totals": figures,
        "tokens": {"pool": 12_345, "target": 9},
        "estimated": True,
        "costs": COSTS,
        "note": "method exact_influence would cost less.",
        "warnings": ["Lower [max_length]."],
    }
    written = io.StringIO()
    render.plan(Console(file=written, width=100), planned)
    text = written.getvalue()
    assert "about 12,345 tokens" in text
    row = next(line for line in text.splitlines() if "embed" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["embed", "2.50", "61.2", "3", "2,048", "50%"]
    assert "Lower [max_length]." in text
    assert "rds_plus costs 3.5 times as much as this job." in " ".join(text.split())
    assert "method exact_influence would cost less." in text


@pytest.mark.parametrize(
    ("kinds", "output_from", "said"),
    [
        (["text", "hidden"], 1.25, "compared: text, hidden; with a refine.max_cost of 1.25 or more, output too."),
        (["text", "output"], 1.25, "compared: text, output."),
        (["text", "hidden"], None, "compared: text, hidden."),
    ],
)
def test_a_plan_names_the_embeddings_that_are_compared(kinds: list[str], output_from: float | None, said: str) -> None:
    planned = {
        "stages": [],
        "totals": dict.fromkeys(("operations", "seconds", "artifact_bytes", "memory_bytes")),
        "tokens": {"pool": 1, "target": 1},
        "estimated": False,
        "candidates": {"kinds": kinds, "output_from": output_from},
        "note": None,
        "warnings": [],
    }
    written = io.StringIO()
    render.plan(Console(file=written, width=200), planned)
    assert said in written.getvalue()


def shown(found: dict[str, Any]) -> list[list[str]]:
    """The lines that are printed, those of tables cut into cells."""
    written = io.StringIO()
    render.sample(Console(file=written, width=140), found)
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in written.getvalue().splitlines()]


SAMPLE = {
    "id": "row-[7]",
    "source": "flan",
    "selected": True,
    "rank": 3,
    "weight": 1.5,
    "influence": 0.25,
    "taken_by": None,
}


def test_a_sample_is_its_parts_and_the_targets_it_is_best_and_worst_for() -> None:
    near = {"id": "row-[1]", "excerpt": "user: a\n\x1b[31mb", "influence": 0.5, "kernel": 0.75, "weight": 0.25}
    targets = [{"id": f"dev-{i}", "excerpt": "w" * 300, "influence": i / 10} for i in range(12)]
    explanation = {
        "sentence": "By landmarks.",
        "target": 4,
        "influence": 0.3,
        "average": 0.04,
        "landmarks": [{**near, "contribution": -0.125}],
        "correction": 0.375,
        "targets": {"data": targets, "has_more": False},
    }
    taken = {"target": 3, "id": "dev-[3]", "pick": 1}
    lines = shown({**SAMPLE, "taken_by": taken, "explanation": explanation, "explanation_missing": None})
    assert lines[:3] == [
        ["row-[7] (flan): selected, rank 3, weight 1.500"],
        ["taken by target dev-[3], as number 2 of its picks"],
        ["influence on target 4 0.3000. By landmarks."],
    ]
    assert ["average of the landmarks", "", "", "", "", "+0.0400"] in lines
    assert ["row-[1]", "user: a \\x1b[31mb", "0.5000", "0.7500", "25.0%", "-0.1250"] in lines
    assert ["correction", "", "", "", "", "+0.3750"] in lines
    assert ["Influence on 10 of 12 targets, best first"] in lines
    listed = [line[0] for line in lines if line[0].startswith("dev-")]
    assert listed == [f"dev-{i}" for i in (11, 10, 9, 8, 7, 4, 3, 2, 1, 0)]


def test_a_sample_that_took_no_part_has_no_number() -> None:
    found = {**SAMPLE, "selected": False, "weight": 0.0, "influence": None}
    explained = {"sentence": "It is [empty].", "target": None, "influence": None, "correction": None, "targets": None}
    lines = shown({**found, "explanation": explained, "explanation_missing": None})
    assert lines == [["row-[7] (flan): not selected, weight 0.000"], ["influence none. It is [empty]."]]
    lines = shown({**found, "explanation": None, "explanation_missing": "Gone."})
    assert lines[1:] == [["influence none"], ["Gone."]]


def test_targets_that_do_not_count_are_not_ranked() -> None:
    targets = [{"id": "dev-0", "excerpt": None, "influence": None}, {"id": "dev-1", "excerpt": None, "influence": -0.5}]
    explanation = {"sentence": "", "target": None, "influence": -0.5, "correction": None}
    lines = shown({**SAMPLE, "explanation": {**explanation, "targets": {"data": targets, "has_more": False}}})
    assert [line[0] for line in lines if line[0].startswith("dev-")] == ["dev-1"]


def test_the_verdict_is_a_line_a_finding_with_what_to_do() -> None:
    found = [
        {
            "about": "repeats",
            "level": "bad",
            "figure": 0.5,
            "meaning": "Half of [them] repeat.",
            "advice": "Take them out.",
        },
        {"about": "rows", "level": "ok", "figure": 0.0, "meaning": "All took part.", "advice": None},
    ]
    written = io.StringIO()
    render.verdict(Console(file=written, width=140), found)
    lines = [line.strip().split(None, 2) for line in written.getvalue().splitlines()]
    assert lines == [["bad", "repeats", "Half of [them] repeat. Take them out."], ["ok", "rows", "All took part."]]


def test_the_results_list_what_was_left_out() -> None:
    first = [{"index": i, "id": f"row-[{i}]", "reason": "no_reply", "detail": "nothing"} for i in range(12)]
    none = {"count": 0, "by_reason": {}, "first": []}
    summary = {"selected_count": 1, "sources": {}, "stages": [], "sentences": ["Said."]}
    written = io.StringIO()
    console = Console(file=written, width=100)
    render.results(console, {**summary, "unusable": {"pool": {"count": 300, "first": first}, "target": none}}, [])
    text = written.getvalue()
    assert "Left out of the pool: 10 of 300" in text
    assert all(part in text for part in ("row-[9]", "no_reply", "nothing", "Said."))
    assert "row-[10]" not in text
    assert "target" not in text


def test_a_sample_without_explanation_says_why() -> None:
    lines = shown({**SAMPLE, "selected": False, "explanation": None, "explanation_missing": "It was [removed]."})
    assert lines == [["row-[7] (flan): not selected, weight 1.500"], ["influence 0.2500"], ["It was [removed]."]]


def told(uploaded: dict[str, Any]) -> list[str]:
    written = io.StringIO()
    render.dataset(Console(file=written, width=60), uploaded)
    return written.getvalue().splitlines()


def test_a_dataset_is_what_was_taken_of_the_upload_and_what_was_not() -> None:
    forms = [
        {"form": "question_answer", "columns": {"prompt": "question", "completion": "completion"}, "rows": 1_200},
        {"form": "text", "columns": {"text": "[red]"}, "rows": 1},
    ]
    notes = [{"code": "after_last_reply", "rows": 3, "message": "3 rows with a note"}]
    detected = {"forms": forms, "more_forms": 2, "left_alone": ["a", "b"], "more_left_alone": 1_000, "notes": notes}
    assert told({"id": "ds_1", "row_count": 1_201, "detected": detected, "skipped": 1}) == [
        "ds_1: 1,201 rows",
        "  1,200 rows of question_answer: prompt from question, completion",
        "  1 row of text: text from [red]",
        "  2 more kinds of rows",
        "  left alone: a, b, 1,000 more",
        "  3 rows with a note",
        "  left out: 1 row that cannot be used, see `winnow skipped ds_1`",
    ]
    assert told({"id": "ds_1", "row_count": 1}) == ["ds_1: 1 row"]  # of a service of an earlier version
