"""Every form of a row, and every reason to refuse one."""

import json
import re
from typing import Any

import pytest

from service.datasets.formats import CanonicalRow, Form, InvalidRow, canonical

USER, ASSISTANT = {"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Seven."}
SYSTEM = {"role": "system", "content": "Be brief."}


def content(fields: dict[str, Any], form: Form = Form.AUTO) -> dict[str, Any]:
    return json.loads(canonical(fields, 0, form).sample)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, {"messages": [SYSTEM, USER, ASSISTANT]}),
        ({"messages": [USER, {**ASSISTANT, "weight": 1}], "extra": 1}, {"messages": [USER, ASSISTANT]}),
        ({"prompt": "Name a prime.", "completion": "Seven."}, {"messages": [USER, ASSISTANT]}),
        ({"instruction": "Name a prime.", "output": "Seven."}, {"messages": [USER, ASSISTANT]}),
        ({"instruction": "Name a prime.", "input": "", "output": "Seven."}, {"messages": [USER, ASSISTANT]}),
        ({"text": "2 3 5 7", "messages": None}, {"text": "2 3 5 7"}),
    ],
)
def test_each_form_becomes_messages_or_text(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert content(fields) == expected


def test_an_instruction_and_its_input_are_two_paragraphs() -> None:
    messages = content({"instruction": "Add.", "input": "1 2", "output": "3"})["messages"]
    assert messages[0] == {"role": "user", "content": "Add.\n\n1 2"}


def test_an_empty_response_is_kept_since_it_is_counted_later() -> None:
    assert content({"prompt": "Name a prime.", "completion": ""})["messages"][1]["content"] == ""


def test_a_named_form_decides_between_several() -> None:
    fields = {"instruction": "a", "output": "b", "text": "a b"}
    with pytest.raises(InvalidRow, match=r"more than one form \(instruction, text\).*\?format="):
        canonical(fields, 0, Form.AUTO)
    assert content(fields, Form.TEXT) == {"text": "a b"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no known form"),
        ({"prompt": "a", "response": "b"}, 'its fields that are not null: "prompt", "response"'),
        ({"text": 3}, "text must be a string, not a number"),
        ({"text": " \n"}, "text is empty"),
        ({"text": "a\0b"}, "text holds a NUL"),
        ({"text": "a\ud800"}, "surrogate pair at character 2"),
        ({"prompt": " ", "completion": ""}, "is empty"),
        ({"prompt": ["a"], "completion": "b"}, "prompt must be a string, not a list"),
        ({"instruction": "a", "input": {}, "output": "b"}, "input must be a string, not an object"),
        ({"messages": []}, "at least one message, not an empty list"),
        ({"messages": "a"}, "messages must be a list"),
        ({"messages": [USER, "a"]}, "messages[1] must be an object"),
        ({"messages": [USER]}, "must end with an assistant message"),
        ({"messages": [USER, ASSISTANT, USER]}, "must end with an assistant message"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "messages[1] is a system message"),
        ({"messages": [{"role": "gpt", "content": "a"}]}, 'role must be one of system, user, assistant, not "gpt"'),
        ({"messages": [{"content": "a"}]}, "messages[0].role must be one of system, user, assistant, not null"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content must be a string, not null"),
        ({"text": "a", "id": True}, "id must be a string or an integer, not a boolean"),
        ({"text": "a", "id": 1.5}, "id must be a string or an integer, not a number"),
        ({"text": "a", "id": ""}, "id must not be empty"),
        ({"text": "a", "id": "x" * 257}, "id must have at most 256 characters, not 257"),
        ({"text": "a", "id": 10**4000}, "id must have at most 256 characters"),
        ({"text": "a", "id": "x\ny"}, 'id must not hold control characters, as "x\\ny" does'),
        ({"text": "a", "source": 1}, "source must be a string, not a number"),
        ({"text": "a", "source": "s" * 257}, "source must have at most 256"),
        ({"text": "a", "source": "(none)"}, "source must not be (none)"),
    ],
)
def test_a_row_that_cannot_be_used_is_told_why(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRow, match=re.escape(message)) as caught:
        canonical(fields, 0, Form.AUTO)
    assert str(caught.value).isascii(), "a message quotes the row, and must be sendable whatever the row holds"


def test_a_named_form_needs_its_fields() -> None:
    with pytest.raises(InvalidRow, match="has no completion, which format=prompt_completion needs"):
        canonical({"prompt": "a", "text": "b"}, 0, Form.PROMPT_COMPLETION)


def test_ids_are_strings_and_default_to_the_row_number() -> None:
    assert canonical({"text": "a"}, 7, Form.AUTO).id == "7"
    assert canonical({"text": "a", "id": 12}, 7, Form.AUTO).id == "12"
    assert canonical({"text": "a", "id": "é-1"}, 7, Form.AUTO).id == "é-1"


def test_the_canonical_line_is_pinned_since_fingerprints_outlive_a_release() -> None:
    row = canonical({"id": 1, "source": "ü", "prompt": 'say "hi"', "completion": "hi\n"}, 0, Form.AUTO)
    assert row == CanonicalRow("1", "ü", row.sample)
    assert row.line().decode() == (
        '["1","ü",{"messages":[{"content":"say \\"hi\\"","role":"user"},{"content":"hi\\n","role":"assistant"}]}]\n'
    )
