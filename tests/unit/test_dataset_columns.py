"""Batches in columns become exactly what their rows become one by one, or are left to that."""

import json
import re
import sys
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.datasets.rows import columns
from service.datasets.rows.canonical import CanonicalRow, canonical
from service.datasets.rows.columns import canonical_columns
from service.datasets.rows.forms import FORMS, Form
from service.datasets.rows.messages import ROLE_OF
from service.datasets.rows.options import RowOptions
from service.names import NOT_IN_NAMES

MIB = 2**20
AUTO = RowOptions()
EVERY_CHARACTER = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.sampled_from(
    [
        "",
        " ",
        "\u3000",
        "\x1c",
        '"',
        "\\",
        "\\n\n\r\t\b\f\x01\x7f",
        "\0",
        "a\nb",
        "\u2028",
        "\u202e",
        "ü",
        "(none)",
        "a" * 257,
    ]
)
plain = st.text('abü"\\\n ', min_size=1, max_size=6).map(lambda text: f"a{text}")
roles = st.sampled_from(["system", "user", "assistant"]) | st.sampled_from(list(ROLE_OF))
message = st.fixed_dictionaries({"role": roles, "content": plain | texts})
said = st.fixed_dictionaries({"from": roles, "value": plain | texts}, optional={"weight": st.just(1)})


def conversation(draws: list[dict[str, str]]) -> list[dict[str, str]]:
    return [*draws, {"role": "assistant", "content": "a"}]


conversations = st.lists(message, max_size=3).map(conversation) | st.lists(message | st.none(), max_size=2)
sharegpt = st.lists(said, max_size=2).map(lambda draws: [*draws, {"from": "gpt", "value": "a"}]) | st.lists(
    said, max_size=2
)


def column(values: st.SearchStrategy[Any], kind: pa.DataType, clean: st.SearchStrategy[Any] | None = None) -> Any:
    """Most columns have clean values alone, or a whole batch would hardly ever be plain."""
    clean = values if clean is None else clean
    of_column = st.sampled_from([clean, clean, clean | st.none(), values | st.none()])
    return lambda rows: of_column.flatmap(lambda values: st.lists(values, min_size=rows, max_size=rows)).map(
        lambda found: pa.array(found, kind)
    )


clean_messages = st.lists(st.fixed_dictionaries({"role": roles, "content": plain}), max_size=3).map(conversation)
clean_sharegpt = st.lists(
    st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": plain}), max_size=2
).map(lambda draws: [*draws, {"from": "gpt", "value": "a"}])
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SHAREGPT = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string()), ("weight", pa.int8())]))
# Every known column, and others: in strings, and where there are lists in those.
KNOWN = sorted({name for slots in FORMS.values() for of in slots for names in of.values() for name in names})
CONTENT = {
    **dict.fromkeys([*KNOWN, "chosen", "image", "dataset", "other"], column(plain | texts, pa.string(), plain)),
    "messages": column(conversations, MESSAGES, clean_messages),
    "conversations": column(sharegpt, SHAREGPT, clean_sharegpt),
    "history": column(st.lists(st.just(["a", "b"]), max_size=1), pa.list_(pa.list_(pa.string()))),
    "input": column(plain | texts, pa.string(), plain),
    "score": column(st.floats(), pa.float64()),
}
FORM_COLUMNS = [
    tuple(names[0] for names in of)
    for slots in FORMS.values()
    for of in (slots.required.values(), (*slots.required.values(), *slots.optional.values()))
]
OPTIONS = [
    *map(RowOptions, Form),
    *(
        RowOptions.parse(columns=columns)
        for columns in (
            "completion:chosen",
            "prompt:text,completion:other,source:input",
            "id:other",
            "source:dataset",
            "text:score",
        )
    ),
]


@st.composite
def batches(draw: st.DrawFn) -> pa.RecordBatch:
    rows = draw(st.integers(1, 4))
    names = draw(st.lists(st.sampled_from(list(CONTENT)), max_size=2, unique=True))
    # Most batches of columns at random are in no form.
    names = list(dict.fromkeys([*draw(st.sampled_from([(), *FORM_COLUMNS])), *names])) or ["text"]
    arrays = {name: draw(CONTENT[name](rows)) for name in names}
    if draw(st.booleans()):
        labels = column(texts | plain, pa.string(), plain)
        floats = column(st.integers(-9, 9).map(float) | st.floats(), pa.float64())
        arrays["id"] = draw(draw(st.sampled_from([labels, column(st.integers(0, 9), pa.int16()), floats]))(rows))
    if draw(st.booleans()):
        arrays["source"] = draw(column(texts | plain, pa.string(), plain)(rows))
    return pa.RecordBatch.from_pydict(arrays)


def one_by_one(batch: pa.RecordBatch, start: int, options: RowOptions) -> list[CanonicalRow]:
    return [canonical(row, start + i, options) for i, row in enumerate(batch.to_pylist())]


def agrees(batch: pa.RecordBatch, options: RowOptions = AUTO) -> bool:
    """Whether the batch was taken in columns, as its rows one by one are."""
    found = canonical_columns(batch, 7, options, MIB)
    if found is None:
        return False
    rows = one_by_one(batch, 7, options)
    assert Counter(dict(found.taken)) == Counter(row.taken for row in rows)
    assert [found.ids.to_pylist(), found.sources.to_pylist(), found.samples.to_pylist()] == [
        [row.id for row in rows],
        [row.source for row in rows],
        [row.sample for row in rows],
    ]
    assert found.lines.to_pylist() == [row.line().decode() for row in rows]
    return True


@given(batch=batches(), options=st.just(AUTO) | st.sampled_from(OPTIONS))
@settings(max_examples=1_000, deadline=None)
def test_columns_agree_with_rows(batch: pa.RecordBatch, options: RowOptions) -> None:
    agrees(batch, options)  # what is invalid raises there


CHAT = [[{"role": "system", "content": " "}, {"role": "user", "content": ""}, {"role": "assistant", "content": 'é"\n'}]]
TALK = [[{"from": "human", "value": "q", "weight": None}, {"from": "gpt", "value": "a"}, {"from": "bot", "value": ""}]]
PLAIN: dict[str, dict[str, Any]] = {
    "text": {"text": ["a", "\ud7ff\\ \x01", "c\u2029"]},
    "prompts": {"prompt": ["a", ""], "completion": ["", "b"]},
    "instructions": {"instruction": ["a", "b", "c"], "input": ["x", "", None], "output": ["1", "2", "3"]},
    "questions": {"question": ["a", "b"], "response": ["1", None], "answer": [None, "2"], "system_prompt": ["s", ""]},
    "inputs": {"inputs": ["a", None], "targets": ["1", None], "input": [None, "b"], "output": [None, "2"]},
    "messages": {"messages": pa.array(CHAT * 3, MESSAGES), "tools": pa.nulls(3), "score": [1.0, 2.0, None]},
    "conversations": {"conversations": pa.array(TALK * 3, SHAREGPT)},
    "ids and sources": {
        "text": ["a", "b", "c"],
        "id": ["x", None, "z"],
        "source": [None, "s", ""],
        "dataset": ["d"] * 3,
    },
    "numbers as ids": {"text": ["a", "b"], "id": pa.array([2**63, None], pa.uint64())},
    "floats as ids": {"text": ["a", "b", "c"], "id": [1.0, float("nan"), None], "input": [float("nan")] * 3},
    "several forms": {
        "text": [None, "b", None, None],
        "prompt": [None, None, "p", None],
        "completion": [None, None, "c", None],
        "messages": pa.array([CHAT[0], None, None, CHAT[0]], MESSAGES),
    },
}


@pytest.mark.parametrize("kind", PLAIN)
def test_ordinary_batches_are_taken_in_columns(kind: str) -> None:
    batch = pa.RecordBatch.from_pydict(PLAIN[kind])
    assert agrees(batch)
    assert agrees(batch.slice(1))


def test_a_conversation_whose_reply_is_named_is_left_to_be_read() -> None:
    options = RowOptions.parse(columns="completion:chosen")
    batch = pa.RecordBatch.from_pydict({"conversation": ['[{"role":"user","content":"q"}]'], "chosen": ["a"]})
    assert canonical_columns(batch, 0, options, MIB) is None
    assert '"content":"q"' in one_by_one(batch, 0, options)[0].sample


def test_a_row_that_is_too_long_is_left_to_be_named() -> None:
    batch = pa.RecordBatch.from_pydict({"text": ["a" * 100, "b"]})
    length = len(one_by_one(batch, 0, AUTO)[0].line())
    assert canonical_columns(batch, 0, AUTO, length) is not None
    assert canonical_columns(batch, 0, AUTO, length - 1) is None


def test_arrow_and_python_agree_on_every_character() -> None:
    every = pa.array(EVERY_CHARACTER)
    blank = columns._is_blank(every).to_pylist()
    assert blank == [not character.strip() for character in EVERY_CHARACTER]
    refused = pc.match_substring_regex(every, columns._REFUSED).to_pylist()
    assert refused == [re.search(NOT_IN_NAMES, character) is not None for character in EVERY_CHARACTER]
    assert columns._json(every).to_pylist() == [json.dumps(c, ensure_ascii=False) for c in EVERY_CHARACTER]
