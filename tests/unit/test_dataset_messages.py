"""Messages in every dialect become one canonical form, whatever file brings them, and nothing of them is lost in silence."""

import json
import re
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.datasets.rows.canonical import CanonicalRow, canonical
from service.datasets.rows.forms import FORMS, ID, MEDIA, SOURCE, Form
from service.datasets.rows.messages import NOTES, ROLE_OF, counts
from service.datasets.rows.options import RowOptions, Taken
from service.datasets.values import InvalidRow

AUTO = RowOptions()
USER, ASSISTANT = {"role": "user", "content": "Time?"}, {"role": "assistant", "content": "Noon."}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "noon"}


def row(*messages: Any, **fields: Any) -> CanonicalRow:
    return canonical({"messages": list(messages), **fields}, 0, AUTO)


def said(*messages: Any) -> list[dict[str, Any]]:
    """The canonical messages of a question, the given ones, and a reply, without those two."""
    found = json.loads(row(USER, *messages, ASSISTANT).sample)["messages"]
    assert (found[0], found[-1]) == (USER, ASSISTANT)
    return found[1:-1]


def reply(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", **keys}


DIALECTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"role": "developer", "content": "Be kind."}, {"role": "system", "content": "Be kind."}),
    ({"from": "human", "value": "Hi"}, {"role": "user", "content": "Hi"}),
    ({"from": "gpt", "value": "Hi", "weight": None}, reply(content="Hi")),
    ({"role": "model", "text": "Hi"}, reply(content="Hi")),
    ({"role": "bot", "content": "Hi", "value": "Hi"}, reply(content="Hi")),
    ({"from": "observation", "value": "noon"}, RESULT),
    ({"role": "function", "name": "clock", "content": "noon"}, {**RESULT, "name": "clock"}),
    (
        {"role": "tool", "tool_call_id": "c1", "name": "", "content": None},
        {"role": "tool", "content": "", "tool_call_id": "c1"},
    ),
    (
        reply(content=[{"type": "text", "text": "a ", "image_url": None}, {"type": "output_text", "text": "b"}, "c"]),
        reply(content="a bc"),
    ),
    (reply(content="a", reasoning_content="b"), reply(content="a", reasoning_content="b")),
    (reply(content="a", thinking="b", reasoning=None), reply(content="a", reasoning_content="b")),
    (reply(content="a", reasoning="b", reasoning_content="b"), reply(content="a", reasoning_content="b")),
    (reply(content=None, reasoning="b"), reply(content="", reasoning_content="b")),
    (reply(content="a", reasoning_content="", tool_calls=[]), reply(content="a")),
    (reply(content=None, tool_calls=[CALL]), CALLING),
    (
        reply(tool_calls=[{"id": "c1", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}]),
        reply(content="", tool_calls=[{**CALL, "id": "c1"}]),
    ),
    (reply(tool_calls=json.dumps([{"name": "clock", "arguments": {"zone": "UTC", "era": None}}])), CALLING),
    (reply(content="", function_call={"name": "clock", "arguments": '{"zone": "UTC"}'}), CALLING),
    ({"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'}, CALLING),
    ({"from": "function_call", "value": json.dumps([CALL, CALL])}, reply(content="", tool_calls=[CALL, CALL])),
    (
        reply(tool_calls=[{"function": {"name": "clock"}}]),
        reply(content="", tool_calls=[{"type": "function", "function": {"name": "clock", "arguments": {}}}]),
    ),
    *(
        (
            reply(tool_calls=[{"function": {"name": "clock", "arguments": text}}]),
            reply(content="", tool_calls=[{"type": "function", "function": {"name": "clock", "arguments": text}}]),
        )
        for text in ("now", "[1]", '{"zone": NaN}', "[" * 5_000)
    ),
    (reply(content="a", weight=1, train=True), reply(content="a")),
    (reply(content="a", weight=0), reply(content="a", counts=False)),
    (reply(content="a", loss_weight=0.0), reply(content="a", counts=False)),
    (reply(content="a", train=False, weight=1), reply(content="a", counts=False)),
    (reply(content="a", counts=False), reply(content="a", counts=False)),
    ({"role": "user", "content": "a", "counts": False, "weight": 1}, {"role": "user", "content": "a"}),
    ({"role": "system", "content": "later"}, {"role": "system", "content": "later"}),
]


@pytest.mark.parametrize(("given_message", "expected"), DIALECTS)
def test_each_dialect_becomes_canonical(given_message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert said(given_message) == [expected]
    assert row(USER, given_message, ASSISTANT).taken == Taken("messages", (("messages", "messages"),))


def test_every_role_is_known() -> None:
    for role in ROLE_OF:
        content = '{"name": "clock"}' if ROLE_OF[role] == "calls" else "a"
        (message,) = said({"from": role, "value": content})
        assert message["role"] == (ROLE_OF[role] if ROLE_OF[role] != "calls" else "assistant")


@pytest.mark.parametrize("content", [None, ""])
def test_an_empty_system_message_is_none(content: str | None) -> None:
    found = row({"role": "system", "content": content}, USER, ASSISTANT)
    assert json.loads(found.sample)["messages"] == [USER, ASSISTANT]
    assert found.taken.notes == ("empty_system",)


def test_only_replies_with_weight_count() -> None:
    messages = [USER, reply(content="a", weight=0), CALLING, RESULT, ASSISTANT, USER]
    found = json.loads(row({"role": "system", "content": "s"}, *messages).sample)["messages"]
    assert [counts(message) for message in found] == [False, False, False, True, False, True, False]


NOTED: list[tuple[list[Any], tuple[str, ...], tuple[str, ...]]] = [
    ([USER, ASSISTANT, USER], (), ("after_last_reply",)),
    ([USER, ASSISTANT, reply(content="a", weight=0)], (), ("after_last_reply",)),
    ([USER, {**ASSISTANT, "weight": 0.5}], (), ("partial_weight",)),
    ([{**USER, "train": True}, ASSISTANT], (), ("not_a_reply",)),
    (
        [{**USER, "mood": 1, "reasoning": "r"}, {**ASSISTANT, "mood": 2}],
        ("messages[].mood", "messages[].reasoning"),
        (),
    ),
    ([USER, {**ASSISTANT, "value": "Other."}], ("messages[].value",), ()),
    ([USER, {**CALLING, "tool_calls": [{**CALL, "index": 0}]}], ("messages[].tool_calls[].index",), ()),
    ([USER, {**ASSISTANT, "\ud800\n": 1}], ('messages[]."\\ud800\\n"',), ()),
]


@pytest.mark.parametrize(("messages", "left", "notes"), NOTED)
def test_what_is_not_taken_is_told(messages: list[Any], left: tuple[str, ...], notes: tuple[str, ...]) -> None:
    assert row(*messages).taken == Taken("messages", (("messages", "messages"),), left, notes)
    assert set(notes) <= set(NOTES)


CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([CLOCK], [CLOCK]),
        (json.dumps([CLOCK]), [CLOCK]),
        (json.dumps(CLOCK["function"]), [CLOCK]),
        ([{"name": "clock", "type": None, "parameters": {"type": "object", "required": None}}], [CLOCK]),
        ([{"type": "function", "name": "clock", "parameters": {"type": "object"}}], [CLOCK]),
        ([{"type": "web_search"}], [{"type": "web_search"}]),
        ("", None),
        ("[]", None),
        ([], None),
        (None, None),
    ],
)
def test_tools_are_one_list_of_functions(tools: Any, expected: Any) -> None:
    assert json.loads(row(USER, ASSISTANT, tools=tools).sample).get("tools") == expected


def deep(depth: int) -> Any:
    return {} if depth == 0 else {"a": deep(depth - 1)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "at least one message, not an empty list"),
        ({"messages": "a"}, "messages is a string that is not JSON"),
        ({"messages": '{"role": "user"}'}, "messages must be a list"),
        ({"messages": [USER, "a"]}, "messages[1] must be an object"),
        ({"messages": [USER]}, "messages has no reply to learn from"),
        ({"messages": [USER, RESULT]}, "messages has no reply to learn from"),
        (
            {"messages": [{"role": "wizard", "content": "a"}]},
            "messages[0].role must be one of system, user, assistant, tool,",
        ),
        ({"messages": [{"content": "a"}]}, "messages[0].role must be one of"),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "conversations[0].from must be one of"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content must be a string, not null"),
        (
            {"messages": [{"role": "user", "content": None}, ASSISTANT]},
            "messages[0].content must be a string, not null",
        ),
        ({"messages": [USER, reply(content="a\0")]}, "messages[1].content contains a NUL"),
        ({"messages": [USER, reply(content=[{"type": "text"}])]}, "messages[1].content[0].text must be a string"),
        ({"messages": [USER, reply(content=[{"type": "image"}])]}, "messages[1].content[0] is an image"),
        ({"messages": [USER, reply(content=[{"type": "input_audio"}])]}, "messages[1].content[0] is an audio"),
        ({"messages": [USER, reply(content=[{"type": "video_url"}])]}, "messages[1].content[0] is a video"),
        (
            {"messages": [USER, reply(content=[{"type": "file"}])]},
            'messages[1].content[0].type must be "text", not "file"',
        ),
        ({"messages": [USER, reply(content="a", weight="0")]}, "messages[1].weight must be 0 or 1"),
        ({"messages": [USER, reply(content="a", weight=-1)]}, "messages[1].weight must be 0 or 1"),
        ({"messages": [USER, reply(content="a", thinking="b", reasoning="c")]}, "which differ"),
        ({"messages": [USER, reply(content="a", name=3)]}, "messages[1].name must be a string"),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ASSISTANT]}, "only an assistant message calls tools"),
        (
            {"messages": [USER, reply(tool_calls=[{"type": "custom", "name": "a"}])]},
            'messages[1].tool_calls[0].type must be "function"',
        ),
        (
            {"messages": [USER, reply(tool_calls=[{"function": {"arguments": {}}}])]},
            "messages[1].tool_calls[0].name must be a string",
        ),
        (
            {"messages": [USER, reply(tool_calls=[{"name": "a", "arguments": [1]}])]},
            "arguments must be an object, or its JSON",
        ),
        ({"messages": [USER, reply(tool_calls=[{"name": "a", "arguments": {"b": {"\ud800": 1}}}])]}, "lone surrogate"),
        ({"messages": [USER, reply(tool_calls=[{"name": "a", "arguments": '{"b": ["c\\u0000"]}'}])]}, "NUL"),
        (
            {"messages": [USER, reply(tool_calls=[{"name": "a", "arguments": {"b": float("inf")}}])]},
            "an infinite number",
        ),
        ({"messages": [USER, reply(tool_calls=[{"name": "a", "arguments": {"b": b"c"}}])]}, "a bytes"),
        ({"messages": [USER, reply(tool_calls=[{"name": "a", "arguments": deep(70)}])]}, "nested more than 64 deep"),
        (
            {"conversations": [{"from": "function_call", "value": "clock()"}, ASSISTANT]},
            "conversations[0].value is a string that is not JSON",
        ),
        ({"messages": [USER, ASSISTANT], "tools": "hammer"}, "tools is a string that is not JSON"),
        ({"messages": [USER, ASSISTANT], "tools": ["hammer"]}, "tools[0] must be an object"),
        ({"messages": [USER, ASSISTANT], "tools": [deep(70)]}, "nested more than 64 deep"),
    ],
)
def test_a_message_that_cannot_be_used_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRow, match=re.escape(message)) as caught:
        canonical(fields, 0, AUTO)
    assert str(caught.value).isascii()


# Arbitrary rows: of the names that mean something, with values that they may and may not have.
NAMES = sorted({name for slots in FORMS.values() for of in slots for names in of.values() for name in names})
KEYS = ["role", "from", "content", "value", "tool_calls", "function_call", "weight", "reasoning", "name", "function"]
PLACES = [*KEYS, "arguments", "type", "text", "id", "x"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([*ROLE_OF, "text", "image", "function", "[]", '{"name": "f"}', "\ud800", "\0"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PLACES), inner, max_size=5),
    max_leaves=12,
)
# Most of them have a form, and most of the messages are well-formed.
likely = st.fixed_dictionaries(
    {"role": st.sampled_from(list(ROLE_OF)), "content": st.text(max_size=3)},
    optional={key: values for key in PLACES if key not in ("role", "content")},
)
content = st.text(max_size=3) | st.lists(st.just({"from": "gpt", "value": "a"}) | likely, max_size=3) | values
filled = st.sampled_from([tuple(names[0] for names in slots.required.values()) for slots in FORMS.values()]).flatmap(
    lambda names: st.fixed_dictionaries(dict.fromkeys(names, content))
)
more = st.dictionaries(
    st.sampled_from([*NAMES, ID, SOURCE, "dataset", *MEDIA, "chosen", "rejected", "other"]) | st.text(max_size=2),
    values | content,
    max_size=3,
)
arbitrary = st.builds(lambda fields, others: others | fields, st.just({}) | filled, more)
options = st.just(AUTO) | st.sampled_from(
    [*map(RowOptions, Form), *(RowOptions.parse(columns=c) for c in ("completion:other", "messages:chosen", "id:text"))]
)


def outcome(fields: dict[str, Any], number: int, options: RowOptions = AUTO) -> CanonicalRow | str:
    try:
        return canonical(fields, number, options)
    except InvalidRow as error:
        return str(error)


@given(fields=arbitrary, options=options)
@settings(max_examples=1_000, deadline=None)
def test_an_arbitrary_row_is_taken_or_refused(fields: dict[str, Any], options: RowOptions) -> None:
    found = outcome(fields, 3, options)
    if isinstance(found, str):
        assert found.isascii()
        return
    sample = json.loads(found.line())[2]
    assert "text" in sample or any(map(counts, sample["messages"]))
    assert canonical({"id": found.id, **sample}, 0, AUTO).sample == found.sample


# Rows of a Parquet file have each field in one type, so these have; what a row does not have is left out or null.
words = st.text("abé\n", max_size=3)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "city": words | st.none(),
        "days": st.integers(0, 9),
        "share": st.floats(0, 1),
        "near": st.fixed_dictionaries({"place": words}, optional={"floors": st.lists(st.integers(0, 9) | st.none())}),
    },
)
calls = st.fixed_dictionaries({"name": words.map("f{}".format), "arguments": arguments}).map(
    lambda function: {"type": "function", "function": function}
)
replies = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": words},
    optional={
        "tool_calls": st.lists(calls, max_size=2),
        "reasoning_content": words | st.none(),
        "weight": st.sampled_from([0, 1, None]),
        "mood": st.integers(0, 1),
    },
)
asked = st.fixed_dictionaries({"role": st.sampled_from(["user", "tool", "system"]), "content": words | st.none()})
tool = st.fixed_dictionaries(
    {"name": words}, optional={"parameters": st.fixed_dictionaries({}, optional={"type": words})}
)
typed = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(replies | asked, max_size=4),
        "tools": st.lists(tool, max_size=2),
        "instruction": words,
        "response": words,
        "history": st.lists(st.tuples(words, words).map(list), max_size=2),
        "dataset": words | st.none(),
        "id": st.integers(0, 9),
    },
)


@given(rows=st.lists(typed, min_size=1, max_size=4))
@settings(max_examples=500, deadline=None)
def test_a_table_gives_what_its_rows_give(rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    for number, (fields, padded) in enumerate(zip(rows, table.to_pylist() if names else rows, strict=True)):
        found, of_table = outcome(fields, number), outcome(padded, number)
        assert found == of_table or isinstance(found, str)  # the fields of an error may stand in another order
        assert isinstance(found, str) == isinstance(of_table, str)
        if isinstance(found, CanonicalRow) and isinstance(of_table, CanonicalRow):
            assert set(found.taken.left) == set(of_table.taken.left)
            assert (found.taken.form, found.taken.notes) == (of_table.taken.form, of_table.taken.notes)
