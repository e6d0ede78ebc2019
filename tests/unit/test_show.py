"""What the command line shows of a plan."""

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
