"""A file of every kind that people have, and what it must become."""

import gzip
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

Json = dict[str, Any]
PAIR = [False, True]


def jsonl(*rows: Json) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(*rows: Json) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), out)
    return out.getvalue()


def arrow(new: Callable[..., Any], *rows: Json) -> bytes:
    out, table = io.BytesIO(), pa.Table.from_pylist(list(rows))
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def says(*turns: str, **more: Any) -> Json:
    """A row of messages, each given as "role: content"."""
    pairs = (turn.partition(": ") for turn in turns)
    return {"messages": [{"role": role, "content": content} for role, _, content in pairs], **more}


def said(*turns: str, **more: Any) -> Json:
    """The same in ShareGPT's words."""
    pairs = (turn.partition(": ") for turn in turns)
    return {"conversations": [{"from": role, "value": content} for role, _, content in pairs], **more}


def with_key(row: Json, index: int, **more: Any) -> Json:
    messages = [{**message, **(more if i == index else {})} for i, message in enumerate(row["messages"])]
    return {**row, "messages": messages}


CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}
TEXT_CALL = {"type": "function", "id": "c7", "function": {"name": "tide", "arguments": '{"port": "Brest"}'}}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
TALK = says("user: High water?", "assistant: ", "tool: 04:12", "assistant: At 04:12.")
CALLED = with_key(TALK, 1, tool_calls=[CALL])
PADDED = [
    with_key(TALK, 1, tool_calls=[{"function": {"name": "tide", "arguments": {"port": "Brest", "day": None}}}]),
    with_key(TALK, 1, tool_calls=[{"function": {"name": "moon", "arguments": {"port": None, "day": 3}}}]),
]
FOUR = says("user: a", "assistant: b", "user: c", "assistant: d")


@dataclass
class Kind:
    """`counts`: of each message of each row; a text counts as one. `taken`: form and columns of the most frequent kind of row."""

    file: bytes
    counts: list[list[bool]] = field(default_factory=list)
    form: str = ""
    columns: Json = field(default_factory=dict)
    params: Json = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: int = 0
    name: str = "file"


KINDS = {
    # Forms
    "messages": Kind(jsonl(says("user: a", "assistant: b")), [PAIR], "messages", {"messages": "messages"}),
    "dataset as source": Kind(
        jsonl(says("user: a", "assistant: b", dataset="tides")), [PAIR], "messages", {"source": "dataset"}
    ),
    "source before dataset": Kind(
        jsonl(says("user: a", "assistant: b", dataset="x", source="s")),
        [PAIR],
        "messages",
        {"source": "source"},
        left=["dataset"],
    ),
    "question and answer": Kind(
        jsonl({"question": "a", "answer": "b", "level": 3}), [PAIR], "question_answer", {"completion": "answer"}, left=["level"]
    ),
    "context": Kind(
        jsonl({"instruction": "a", "context": "c", "response": "b"}), [PAIR], "instruction", {"context": "context"}
    ),
    "system": Kind(
        jsonl({"system_prompt": "s", "question": "a", "response": "b"}, {"system_prompt": "", "question": "a", "response": "b"}),
        [[False, False, True], PAIR],
        "question_answer",
    ),
    "inputs and targets": Kind(jsonl({"inputs": "a", "targets": "b"}), [PAIR], "inputs_targets", {"completion": "targets"}),
    "history": Kind(
        jsonl({"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]}),
        [[False, False, True, False, True]],
        "instruction",
    ),
    "conversations": Kind(jsonl(said("system: s", "human: a", "gpt: b")), [[False, False, True]], "conversations"),
    "conversations with a system": Kind(
        jsonl(said("human: a", "gpt: b", system="s")), [[False, False, True]], "conversations"
    ),
    "conversations with calls": Kind(
        jsonl(
            said(
                "human: a", 'function_call: {"name": "tide", "arguments": {}}', "observation: 04:12", "gpt: b",
                tools='[{"name": "tide", "parameters": {}}]',
            )
        ),
        [[False, True, False, True]],
        "conversations",
    ),
    "prompt of messages": Kind(
        jsonl({"prompt": FOUR["messages"][:3], "completion": FOUR["messages"][3:]}),
        [[False, False, False, True]],
        "prompt_completion",
    ),
    "instruction before text": Kind(
        jsonl({"instruction": "a", "input": "", "output": "b", "text": "a b"}), [PAIR], "instruction", left=["text"]
    ),
    "mapped": Kind(
        jsonl({"frage": "a", "antwort": "b", "korpus": "k", "nr": 7}),
        [PAIR],
        "prompt_completion",
        {"prompt": "frage", "completion": "antwort", "source": "korpus", "id": "nr"},
        {"columns": "prompt:frage,completion:antwort,source:korpus,id:nr"},
    ),
    "chosen, mapped": Kind(
        jsonl({"prompt": "a", "chosen": "b", "rejected": "c"}),
        [PAIR],
        "prompt_completion",
        {"completion": "chosen"},
        {"columns": "completion:chosen"},
        left=["rejected"],
    ),
    "template": Kind(
        jsonl({"passage": "p", "ask": "a", "options": ["x", "y"], "label": 1}),
        [PAIR],
        "template",
        params={"template": json.dumps({"user": "{{ passage }} {{ ask }}", "assistant": "{{ options[label] }}"})},
    ),
    # Messages
    "calls as text": Kind(
        jsonl({**with_key(TALK, 1, tool_calls=[TEXT_CALL], content=None), "tools": [TOOL]}), [[False, True] * 2]
    ),
    "calls as objects": Kind(jsonl(CALLED), [[False, True] * 2]),
    "parts": Kind(jsonl(with_key(says("user: ", "assistant: b"), 0, content=[{"type": "text", "text": "a"}])), [PAIR]),
    "developer": Kind(jsonl(says("developer: s", "user: a", "assistant: b")), [[False, False, True]]),
    "empty system": Kind(
        jsonl(with_key(says("system: ", "user: a", "assistant: b"), 0, content=None)), [PAIR], notes=["empty_system"]
    ),
    "weight": Kind(jsonl(with_key(FOUR, 1, weight=0)), [[False, False, False, True]]),
    "train": Kind(jsonl(with_key(FOUR, 1, train=False)), [[False, False, False, True]]),
    "loss_weight": Kind(jsonl(with_key(FOUR, 3, loss_weight=0)), [[False, True, False, False]], notes=["after_last_reply"]),
    "counts": Kind(jsonl(with_key(FOUR, 1, counts=False)), [[False, False, False, True]]),
    "reasoning": Kind(jsonl(with_key(FOUR, 1, reasoning_content="r"), with_key(FOUR, 3, thinking="r")), [[False, True] * 2] * 2),
    "think": Kind(jsonl(says("user: a", "assistant: <think>\nr\n</think>\n\nb")), [PAIR]),
    "more after the last reply": Kind(
        jsonl(says("user: a", "assistant: b", "user: c"), says("user: a", "assistant: b")),
        [[False, True, False], PAIR],
        notes=["after_last_reply"],
    ),
    # Rows
    "one bad": Kind(
        jsonl({"text": "a"}) + b"{\n" + jsonl({"text": "b"}), [[True]] * 2, "text", params={"on_bad_row": "skip"}, skipped=1
    ),
    "lone surrogate": Kind(
        jsonl(says("user: a", "assistant: b")) + b'{"text": "half \\udcb2"}', [PAIR], params={"on_bad_row": "skip"}, skipped=1
    ),
    "repeated id": Kind(
        jsonl({"id": "a", "text": "t"}, {"id": "a", "text": "u"}), [[True]], params={"on_bad_row": "skip"}, skipped=1
    ),
    "float ids": Kind(jsonl({"id": 1.0, "text": "t"}, {"id": 2.0, "text": "u"}), [[True]] * 2, "text", {"id": "id"}),
    "a type that comes late": Kind(
        jsonl(*({"text": f"t{i}", "extra": i if i > 40 else None} for i in range(50))), [[True]] * 50, left=["extra"]
    ),
    # Containers
    "array": Kind(json.dumps([{"question": "a", "answer": "b"}] * 2, indent=2).encode(), [PAIR] * 2),
    "data": Kind(json.dumps({"data": [{"question": "a", "answer": "b"}], "version": 1}).encode(), [PAIR], left=["version"]),
    "one object": Kind(json.dumps(said("human: a", "gpt: b"), indent=1).encode(), [PAIR], "conversations"),
    "csv": Kind(
        b'instruction,input,output\r\na,,b\r\n"c, d",e,"f\ng"\r\n', [PAIR] * 2, "instruction", name="table.csv"
    ),
    "tsv": Kind(b'question\tanswer\na\t"b,\nc"\n', [PAIR], "question_answer", name="table.tsv"),
    "text": Kind(b"One.\n\nTwo,\nstill two.\n", [[True]] * 2, "text", params={"format": "text"}),
    "packed": Kind(gzip.compress(json.dumps([{"question": "a", "answer": "b"}]).encode()), [PAIR], "question_answer"),
    "zstd": Kind(pa.compress(jsonl({"text": "a"}), "zstd", asbytes=True), [[True]], "text"),
    "byte order mark": Kind(b"\xef\xbb\xbf" + jsonl({"text": "a"}), [[True]], "text"),
    "carriage returns": Kind(b'{"text": "a"}\r\n{"text": "b"}\r\n', [[True]] * 2, "text"),
    "parquet": Kind(parquet({"text": "a", "extra": 1}), [[True]], "text", left=["extra"]),
    "parquet of calls": Kind(parquet(*PADDED), [[False, True] * 2] * 2, "messages"),
    "NaN": Kind(parquet({"instruction": "a", "input": math.nan, "output": "b"}), [PAIR], "instruction"),
    "arrow file": Kind(arrow(pa.ipc.new_file, {"text": "a"}), [[True]], "text"),
    "arrow stream": Kind(arrow(pa.ipc.new_stream, {"text": "a"}), [[True]], "text"),
}  # fmt: skip
