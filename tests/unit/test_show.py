"""What the command line shows of a plan, and of a sample."""

import io
from typing import Any

from rich.console import Console

from service import show


def entry(stage: str, **figures: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(("operations", "seconds", "artifact_bytes", "memory_bytes"))
    return {"stage": stage, **unknown, "already_there": 0.0, **figures}


def test_a_plan_is_a_table_with_its_sum_and_its_sentences() -> None:
    figures = {"operations": 2.5e12, "seconds": 61.25, "artifact_bytes": 3 * 2**20, "memory_bytes": 2**31}
    planned = {
        "stages": [entry("prepare"), entry("embed", **figures, already_there=0.5)],
        "totals": figures,
        "tokens": {"pool": 12_345, "target": 9},
        "estimated": True,
        "note": "method exact_influence would cost less.",
        "warnings": ["Lower [max_length]."],
    }
    written = io.StringIO()
    show.plan(Console(file=written, width=100), planned)
    text = written.getvalue()
    assert "about 12,345 tokens" in text
    row = next(line for line in text.splitlines() if "embed" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["embed", "2.50", "61.2", "3", "2,048", "50%"]
    assert "Lower [max_length]." in text
    assert "method exact_influence would cost less." in text


def shown(found: dict[str, Any]) -> list[list[str]]:
    """The lines that are printed, those of tables cut into cells."""
    written = io.StringIO()
    show.sample(Console(file=written, width=140), found)
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in written.getvalue().splitlines()]


SAMPLE = {"id": "row-[7]", "source": "flan", "selected": True, "rank": 3, "weight": 1.5, "influence": 0.25}


def test_a_sample_is_its_landmarks_and_the_targets_it_is_best_and_worst_for() -> None:
    landmark = {"id": "row-[1]", "influence": 0.5, "kernel": 0.75, "contribution": -0.125, "share": 0.25}
    targets = [{"id": f"dev-{i}", "influence": i / 10} for i in range(12)]
    explanation = {
        "sentence": "By landmarks.",
        "target": 4,
        "influence": 0.3,
        "landmarks": [landmark],
        "others": {"count": 11, "contribution": 0.375, "share": 0.75},
        "targets": {"data": targets, "has_more": False},
    }
    lines = shown({**SAMPLE, "explanation": explanation, "explanation_missing": None})
    assert lines[:2] == [
        ["row-[7] (flan): selected, rank 3, weight 1.500"],
        ["influence on target 4 0.3000. By landmarks."],
    ]
    assert ["row-[1]", "0.5000", "0.7500", "-0.1250", "25.0%"] in lines
    assert ["11 others", "", "", "0.3750", "75.0%"] in lines
    assert ["Influence on 10 of 12 targets, best first"] in lines
    listed = [line[0] for line in lines if line[0].startswith("dev-")]
    assert listed == [f"dev-{i}" for i in (11, 10, 9, 8, 7, 4, 3, 2, 1, 0)]


def test_a_sample_without_explanation_says_why() -> None:
    lines = shown({**SAMPLE, "selected": False, "explanation": None, "explanation_missing": "It was [removed]."})
    assert lines == [["row-[7] (flan): not selected, weight 1.500"], ["influence 0.2500"], ["It was [removed]."]]
