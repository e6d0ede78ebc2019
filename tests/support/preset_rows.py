"""Rows as the datasets of the ready-made targets have them on the hub, and repositories that hold them."""

import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from service.datasets.presets import PRESETS

Row = dict[str, Any]
SHOTS = """Sort the words.

More on that.

Q: pear fig
A: Let's think step by step.
f is before p.

So the answer is fig pear.

Q: List: b a
Options:
(A) a b
A: Let's think step by step.
a: first. So the answer is (A).

Q: ö o
A: Let's think step by step.
So the answer is o ö."""
CODE = (
    "import math\r\ndef half(n):\r\n\treturn n / 2 \r\ndef area(r): # of a circle\r\n  x = half(2 * r)\r\n\r\n"
    "  return x ** 2 \r\n"
)
ROWS: dict[str, Row] = {
    "gsm8k": {"question": "Two boxes of 3?\n", "answer": "It is 2*3 = <<2*3=6>>6.\nAnd <<6+0=6>>6 € more.\n#### 12"},
    "squad": {
        "id": "5733be284776f41900661182",
        "title": "Main_Street",
        "context": " A golden statue stands on the dome. ",
        "question": " What stands there?",
        "answers": {"text": ["a golden statue"], "answer_start": [1]},
    },
    "mmlu": {
        "question": "Which is prime?",
        "subject": "elementary_mathematics",
        "choices": ["4", "7 ", "8", "9"],
        "answer": 1,
    },
    "bbh": {"dataset_name": "word_sorting", "answer_only_prompt": "-", "chain_of_thought_prompt": SHOTS},
    "tydiqa": {
        "id": "bengali--2387335860751143628-1",
        "title": "ঢাকা",
        "context": "ঢাকা বাংলাদেশের রাজধানী।",
        "question": "বাংলাদেশের রাজধানী কোনটি?",
        "answers": {"text": ["ঢাকা", "ঢাকা শহর"], "answer_start": [0, 0]},
    },
    "codex": {
        "task_id": 511,
        "text": "Write a function to find an area.",
        "code": CODE,
        "test_list": ["assert area(2) == 4", "assert area(0) == 0"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
}
_ANSWERS = pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int32()))])
_TYPES = {"answers": _ANSWERS, "answer": pa.int64(), "task_id": pa.int32()}
_LISTS = ("choices", "test_list", "challenge_test_list")
# What makes one row another; where samples are spread, over three values, in order.
_ANOTHER: dict[str, Callable[[int], Row]] = {
    "gsm8k": lambda i: {
        "question": f"{i} boxes of 3?",
        "answer": f"It is {i}*3 = <<{i}*3={3 * i}>>{3 * i}.\n#### {3 * i}",
    },
    "squad": lambda i: {"id": f"5733{i:020x}", "question": f"What stands on dome {i}?"},
    "mmlu": lambda i: {"subject": ("anatomy", "law", "virology")[i // 5 % 3], "question": f"Which is prime, not {i}?"},
    "bbh": lambda i: {
        "dataset_name": ("navigate", "snarks", "word_sorting")[i % 3],
        "chain_of_thought_prompt": SHOTS.replace("pear", f"pear{i}")
        .replace("b a", f"b a{i}")
        .replace("ö o", f"ö o{i}"),
    },
    "tydiqa": lambda i: {"id": f"{('bengali', 'korean', 'telugu')[i // 10 % 3]}-{i}-1", "question": f"কোনটি {i}?"},
    "codex": lambda i: {"task_id": 511 + i, "text": f"Write a function to find area {i}."},
}


def rows(name: str, count: int) -> list[Row]:
    """Rows of a preset's dataset, no two alike."""
    return [{**ROWS[name], **_ANOTHER[name](i)} for i in range(count)]


def parquet(name: str, made: list[Row]) -> bytes:
    """The rows with the types that the dataset has."""
    types = {
        column: pa.list_(pa.string()) if column in _LISTS else _TYPES.get(column, pa.string()) for column in ROWS[name]
    }
    if name == "gsm8k":
        types["answer"] = pa.string()
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(made, pa.schema(list(types.items()))), buffer, row_group_size=7)
    return buffer.getvalue()


def repository(name: str, made: list[Row]) -> dict[str, bytes]:
    """The files of a preset's dataset: the split that it takes, in two parts, and others that it must not take."""
    split = PRESETS[name].hub
    half = len(made) // 2
    data = [
        {"split": split.split, "path": f"{split.config}/{split.split}-*"},
        {"split": "held_out", "path": f"{split.config}/held_out-*"},
    ]
    other = {"config_name": "other", "data_files": [{"split": split.split, "path": "other/*"}]}
    front = {"configs": [other, {"config_name": split.config, "data_files": data}]}
    return {
        "README.md": f"---\n{json.dumps(front)}\n---\n# A dataset\n".encode(),
        f"{split.config}/{split.split}-00000-of-00002.parquet": parquet(name, made[:half]),
        f"{split.config}/{split.split}-00001-of-00002.parquet": parquet(name, made[half:]),
        f"{split.config}/held_out-00000-of-00001.parquet": b"not to be read",
        "other/rows.parquet": b"not to be read",
    }
