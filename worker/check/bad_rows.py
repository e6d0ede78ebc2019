"""The rows of a file that cannot be used, by reason."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

_MAX_REASONS = 100
_NAMED = 100
# What one row's reason says of that row alone: what it quotes, and numbers.
_OWN = re.compile(r"\"(?:[^\"\\]|\\.)*\"|\d+(?:[.,]\d+)*")


def bad_rows(report: Path) -> dict[str, Any]:
    """What the report of an upload (`service.datasets.bad_rows`) names: {count, by_reason, more_reasons, first}.

    Reasons that differ only in what they quote or count are one, told by its first row; `more_reasons` are the rows of reasons
    beyond the first hundred.
    """
    rows: Counter[str] = Counter()
    examples: dict[str, Any] = {}
    first: list[dict[str, Any]] = []
    with gzip.open(report, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if len(first) < _NAMED:
                first.append(row)
            reason = _OWN.sub("*", row["reason"])
            if reason not in examples and len(examples) < _MAX_REASONS:
                examples[reason] = row
            rows[reason if reason in examples else ""] += 1
    more = rows.pop("", 0)
    by_reason = [{"rows": count, "first": examples[reason]} for reason, count in rows.most_common()]
    return {"count": rows.total() + more, "by_reason": by_reason, "more_reasons": more, "first": first}
