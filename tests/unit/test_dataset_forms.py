"""Every form of a row, what is taken of it, and every reason to refuse one."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from service.datasets.rows.canonical import CanonicalRow, canonical
from service.datasets.rows.forms import FORMS, MEDIA, Form
from service.datasets.rows.messages import ROLE_OF
from service.datasets.rows.options import RowOptions, Taken
from service.datasets.values import InvalidRow
from service.http.errors import Unprocessable

USER, ASSISTANT = {"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Seven."}
SYSTEM = {"role": "system", "content": "Be brief."}
AUTO = RowOptions()


def row(fields: dict[str, Any], columns: str | None = None, form: Form = Form.AUTO) -> CanonicalRow:
    return canonical(fields, 0, RowOptions.parse(form, columns))


def content(fields: dict[str, Any], columns: str | None = None, form: Form = Form.AUTO) -> dict[str, Any]:
    return json.loads(row(fields, columns, form).sample)


def taken(fields: dict[str, Any], columns: str | None = None) -> dict[str, str]:
    return dict(row(fields, columns).taken.columns)


# The first digits of the sha256 of each row's line, as the first release wrote them: stored datasets and results have them.
PLAIN = [
    ({"text": "2 3 5 7"}, "7476c00522645283"),
    (
        {"text": ' a\tb\n"c" \\ é 世界 😀 \u2028 \x7f', "id": "x", "source": "s"},
        "bf8337f545857141",
    ),
    ({"id": 12, "source": "ü", "prompt": "Name a prime.", "completion": "Seven."}, "b773b6640d1cfb80"),
    ({"id": "no answer", "prompt": "Name a prime.", "completion": ""}, "8df321b18a7c2a12"),
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, "25e7b87bd7e2d0e8"),
    ({"instruction": "Greet.", "input": "", "output": "Hello.", "source": ""}, "e808876dd35194bd"),
    ({"instruction": "Greet.", "input": None, "output": "Hello.", "messages": None}, "49775d16d8260438"),
    ({"messages": [USER, ASSISTANT]}, "a577f5a6cc4fc0d9"),
    ({"messages": [ASSISTANT]}, "faefdd2cff02e9e2"),
    ({"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT], "score": 0.5}, "c10847cf02d8122e"),
    (
        {
            "messages": [
                {**USER, "name": None},
                {**ASSISTANT, "weight": 1},
                {"role": "user", "content": ""},
                {"role": "assistant", "content": " "},
            ]
        },
        "a2931e23af46e48c",
    ),
    ({"messages": [USER, USER, ASSISTANT, ASSISTANT]}, "2163e0db1832209a"),
]


@pytest.mark.parametrize("number", range(len(PLAIN)))
def test_fingerprints_outlive_a_release(number: int) -> None:
    fields, digest = PLAIN[number]
    assert hashlib.sha256(canonical(fields, number, AUTO).line()).hexdigest()[:16] == digest


SAID = [USER, ASSISTANT]
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Name a prime."}, {"from": "gpt", "value": "Seven."}]
TEXT = {"role": "user", "content": "Add.\n\n1 2"}
EACH_FORM: list[tuple[dict[str, Any], str, list[dict[str, Any]]]] = [
    ({"messages": SAID}, "messages", SAID),
    ({"messages": json.dumps(SAID)}, "messages", SAID),
    ({"conversations": SHAREGPT}, "conversations", SAID),
    ({"conversation": SAID}, "conversations", SAID),
    ({"conversations": SHAREGPT, "system": "Be brief."}, "conversations", [SYSTEM, *SAID]),
    ({"conversations": [SYSTEM, *SAID], "system": "Be brief."}, "conversations", [SYSTEM, *SAID]),
    ({"conversations": [SYSTEM, *SAID], "system": "Be"}, "conversations", [{**SYSTEM, "content": "Be"}, SYSTEM, *SAID]),
    ({"prompt": "Name a prime.", "completion": "Seven."}, "prompt_completion", SAID),
    (
        {"prompt": "Name a prime.", "completion": "Seven.", "system_prompt": "Be brief."},
        "prompt_completion",
        [SYSTEM, *SAID],
    ),
    ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion", SAID),
    ({"prompt": [USER], "completion": "Seven."}, "prompt_completion", SAID),
    (
        {"prompt": [*EARLIER, USER], "completion": [ASSISTANT, USER, ASSISTANT]},
        "prompt_completion",
        [EARLIER[0], {**EARLIER[1], "counts": False}, *SAID, *SAID],
    ),
    ({"instruction": "Name a prime.", "output": "Seven."}, "instruction", SAID),
    ({"instruction": "Name a prime.", "response": "Seven.", "context": ""}, "instruction", SAID),
    (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        "instruction",
        [TEXT, {"role": "assistant", "content": "3"}],
    ),
    (
        {"instruction": "Name a prime.", "output": "Seven.", "system": "Be brief.", "history": [["Hi", "Hello"]]},
        "instruction",
        [SYSTEM, *EARLIER, *SAID],
    ),
    ({"instruction": "Name a prime.", "output": "Seven.", "system": "", "history": []}, "instruction", SAID),
    ({"question": "Name a prime.", "answer": "Seven."}, "question_answer", SAID),
    ({"query": "Name a prime.", "response": "Seven."}, "question_answer", SAID),
    (
        {"question": "Add.", "context": "1 2", "answer": "3"},
        "question_answer",
        [TEXT, {"role": "assistant", "content": "3"}],
    ),
    ({"inputs": "Name a prime.", "targets": "Seven."}, "inputs_targets", SAID),
    ({"input": "Name a prime.", "output": "Seven."}, "inputs_targets", SAID),
    ({"input": [USER], "output": "Seven."}, "inputs_targets", SAID),
]


@pytest.mark.parametrize(("fields", "form", "messages"), EACH_FORM)
def test_each_form_becomes_messages(fields: dict[str, Any], form: str, messages: list[dict[str, Any]]) -> None:
    found = row(fields)
    assert json.loads(found.sample) == {"messages": messages}
    assert (found.taken.form, found.taken.left, found.taken.notes) == (form, (), ())
    assert {column for _, column in found.taken.columns} == set(fields)
    assert content(fields, form=Form(form)) == {"messages": messages}


def test_a_text_is_kept_as_it_is() -> None:
    assert content({"text": " 2 3\n", "messages": None}) == {"text": " 2 3\n"}


@pytest.mark.parametrize("absent", [None, float("nan")])
def test_null_and_nan_count_as_absent(absent: Any) -> None:
    fields = {"instruction": "Name a prime.", "input": absent, "output": "Seven.", "source": absent, "id": absent}
    assert row(fields) == CanonicalRow("0", None, row({"messages": SAID}).sample)
    assert row(fields).taken == Taken("instruction", (("prompt", "instruction"), ("completion", "output")))


def test_of_several_forms_the_first_is_taken_and_the_rest_is_told() -> None:
    every = {
        "text": "t",
        "inputs": "i",
        "targets": "t",
        "question": "q",
        "answer": "a",
        "instruction": "i",
        "output": "o",
        "prompt": "p",
        "completion": "c",
        "conversations": SHAREGPT,
        "messages": SAID,
    }
    for form in [form for form in Form if form is not Form.AUTO]:
        assert row(every).taken.form == form
        slots = FORMS[form].required.values()
        used = {next(name for name in names if name in every) for names in slots}
        assert set(row(every).taken.left) == set(every) - used
        every = {name: value for name, value in every.items() if name not in used}
    assert not every


def test_a_named_form_decides_between_several() -> None:
    assert content({"instruction": "a", "output": "b", "text": "a b"}, form=Form.TEXT) == {"text": "a b"}
    with pytest.raises(InvalidRow, match="has no completion, which format=prompt_completion requires"):
        content({"prompt": "a", "text": "b"}, form=Form.PROMPT_COMPLETION)


def test_the_source_is_source_or_else_dataset_if_it_is_a_string() -> None:
    assert row({"text": "a", "dataset": "d"}).source == "d"
    assert row({"text": "a", "dataset": "d", "source": None}).source == "d"
    both = row({"text": "a", "dataset": "d", "source": "s"})
    assert (both.source, both.taken.left) == ("s", ("dataset",))
    number = row({"text": "a", "dataset": 3})
    assert (number.source, number.taken) == (None, Taken("text", (("text", "text"),), ("dataset",)))
    with pytest.raises(InvalidRow, match="dataset must be a string"):
        row({"text": "a", "dataset": 3}, "source:dataset")


MAPPED: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    (
        "prompt:frage,completion:antwort,source:korpus,id:nr",
        {"frage": "Name a prime.", "antwort": "Seven.", "korpus": "k", "nr": 7},
        {"prompt": "frage", "completion": "antwort", "source": "korpus", "id": "nr"},
    ),
    (
        "completion:chosen",
        {"prompt": "Name a prime.", "chosen": "Seven.", "rejected": "Six."},
        {"prompt": "prompt", "completion": "chosen"},
    ),
    (
        "completion:chosen",
        {"prompt": "Name a prime.", "chosen": [ASSISTANT], "rejected": [USER]},
        {"prompt": "prompt", "completion": "chosen"},
    ),
    ("messages:chosen", {"chosen": SAID, "rejected": [USER], "messages": [USER]}, {"messages": "chosen"}),
    ("completion:truth", {"messages": [USER], "truth": "Seven."}, {"prompt": "messages", "completion": "truth"}),
    (
        "completion:truth",
        {"messages": [USER], "truth": "Seven.", "prompt": "Name a prime."},
        {"prompt": "prompt", "completion": "truth"},
    ),
    (
        "completion:reply",
        {"question": "Name a prime.", "reply": "Seven.", "answer": "7"},
        {"prompt": "question", "completion": "reply"},
    ),
    (
        "instruction:task",
        {"task": "Name a prime.", "input": "", "output": "Seven.", "id": 1},
        {"prompt": "task", "context": "input", "completion": "output", "id": "id"},
    ),
    (
        "context:answer",
        {"question": "Name a prime.", "answer": "", "response": "Seven."},
        {"prompt": "question", "context": "answer", "completion": "response"},
    ),
    (
        "prompt:source,completion:target",
        {"source": "Name a prime.", "target": "Seven."},
        {"prompt": "source", "completion": "target"},
    ),
    (
        '{"prompt": "a, b", "completion": "c:d"}',
        {"a, b": "Name a prime.", "c:d": "Seven."},
        {"prompt": "a, b", "completion": "c:d"},
    ),
    (
        "prompt:q,completion:a",
        {"q": "Name a prime.", "a": "Seven.", "text": "t", "messages": [USER]},
        {"prompt": "q", "completion": "a"},
    ),
]


@pytest.mark.parametrize(("columns", "fields", "slots"), MAPPED)
def test_named_columns_win_and_the_rest_is_found_as_usual(
    columns: str, fields: dict[str, Any], slots: dict[str, str]
) -> None:
    found = row(fields, columns)
    assert json.loads(found.sample) == {"messages": SAID}
    assert dict(found.taken.columns) == slots
    assert set(found.taken.left) == set(fields) - set(slots.values())
    assert set(slots.values()) <= set(RowOptions.parse(columns=columns).wanted or ())


@pytest.mark.parametrize(
    "columns",
    [
        "",
        "prompt",
        "prompt:",
        "frage:prompt",
        "prompt:a,prompt:b",
        "text:a,prompt:b",
        "prompt:a\nb",
        "{",
        '{"prompt": 1}',
    ],
)
def test_a_mapping_that_cannot_be_meant_is_refused(columns: str) -> None:
    with pytest.raises(Unprocessable) as error:
        RowOptions.parse(columns=columns)
    assert error.value.param == "columns"


def test_what_the_reader_needs_is_wanted() -> None:
    wanted = RowOptions().wanted
    assert wanted is not None
    assert {"messages", "system_prompt", "history", "tools", "dataset", "id", "images", "chosen"} <= set(wanted)
    assert "messages" not in (RowOptions(Form.TEXT).wanted or ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "matches no known form"),
        ({"prompt": "a", "reply": "b"}, "?columns=completion:reply"),
        ({"prompt": "a"}, "?columns=completion:COLUMN"),
        ({"a": "b", "\ud800": "x"}, "its non-null fields are: a, "),
        ({"text": 3}, "text must be a string, not a number"),
        ({"text": " \n"}, "text is empty"),
        ({"text": "a\0b"}, "text contains a NUL"),
        ({"text": "a\ud800"}, "lone surrogate at character 2"),
        ({"prompt": " ", "completion": ""}, "is empty"),
        ({"prompt": 1, "completion": "b"}, "prompt must be a string, not a number"),
        ({"prompt": [USER], "completion": SAID}, "?columns=messages:completion"),
        ({"instruction": "a", "input": {}, "output": "b"}, "input must be a string, not an object"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[0] must be a pair"),
        ({"instruction": "a", "output": "b", "history": [["x", None]]}, "history[0][1] must be a string"),
        ({"question": [USER], "context": "c", "answer": "b"}, "to which context cannot be added"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "?columns=completion:chosen"),
        ({"chosen": SAID, "rejected": SAID}, "?columns=messages:chosen"),
        ({"chosen": "Q: a A: b", "rejected": "Q: a A: c"}, "?columns=text:chosen"),
        ({"messages": [USER], "ground_truth": "3"}, "?columns=completion:ground_truth"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "each has a weight of 0"),
        ({"messages": SAID, "images": ["a.png"]}, "column images"),
        ({"text": "a", "image": {"bytes": b"", "path": None}}, "column image"),
        ({"text": "a", "id": True}, "id must be a string or an integer, not a boolean"),
        ({"text": "a", "id": 1.5}, "id must be a string or an integer, not a number"),
        ({"text": "a", "id": ""}, "id must not be empty"),
        ({"text": "a", "id": "x" * 257}, "id must have at most 256 characters, not 257"),
        ({"text": "a", "id": 10**4000}, "id must have at most 256 characters"),
        ({"text": "a", "id": "x\ny"}, "id must not contain control characters"),
        ({"text": "a", "source": "x\u202ey"}, "remove U+202E, character 2"),
        ({"text": "a", "source": 1}, "source must be a string, not a number"),
        ({"text": "a", "source": "s" * 257}, "source must have at most 256"),
        ({"text": "a", "source": "(none)"}, "source must not be (none)"),
        ({"text": "a", "dataset": "(other)"}, "dataset must not be (other)"),
    ],
)
def test_an_invalid_row_is_refused_with_the_reason(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRow, match=re.escape(message)) as caught:
        canonical(fields, 0, AUTO)
    assert str(caught.value).isascii(), "a message quotes the row, and must be sendable whatever the row holds"


def test_a_named_column_is_named_in_errors() -> None:
    with pytest.raises(InvalidRow, match="has no antwort, which columns=completion:antwort names"):
        row({"frage": "a"}, "prompt:frage,completion:antwort")
    with pytest.raises(InvalidRow, match="antwort must be a string, not a number"):
        row({"frage": "a", "antwort": 1}, "prompt:frage,completion:antwort")


@pytest.mark.parametrize("images", [[], "", {}, {"bytes": None, "path": None}])
def test_no_pictures_are_no_reason_to_refuse(images: Any) -> None:
    found = row({"messages": SAID, "images": images})
    assert (json.loads(found.sample), found.taken.left) == ({"messages": SAID}, ("images",))


def test_ids_are_strings_and_default_to_the_row_number() -> None:
    for given, id in ((12, "12"), ("é-1", "é-1"), (1.0, "1"), (-0.0, "0")):
        assert canonical({"text": "a", "id": given}, 7, AUTO).id == id
    assert canonical({"text": "a"}, 7, AUTO).id == "7"


def test_plans_are_kept_for_rows_alike_but_not_without_end() -> None:
    options = RowOptions()
    assert canonical({"text": "a"}, 0, options).taken is canonical({"text": "b"}, 1, options).taken
    for i in range(5_000):
        canonical({"text": "a", f"column {i}": 1}, i, options)
    assert len(options.plans) < 5_000


DOCUMENT = (Path(__file__).parents[2] / "docs/data.md").read_text()


def test_the_document_tells_the_table() -> None:
    lines = [
        line
        for line in DOCUMENT.splitlines()
        if (found := re.match(r"\| `(\w+)` \| `", line)) and found[1] in set(Form)
    ]
    assert [re.findall(r"`(\w+)`", line)[0] for line in lines] == list(FORMS)
    for line, slots in zip(lines, FORMS.values(), strict=True):
        for cell, of in zip(line.split(" | ")[1:], slots, strict=False):
            names = [" \\| ".join(f"`{name}`" for name in columns) for columns in of.values()]
            assert all(name in cell for name in names)
    assert all(f"`{name}`" in DOCUMENT for name in (*MEDIA, *ROLE_OF))


def test_the_examples_of_the_document_are_taken() -> None:
    examples = [line for line in DOCUMENT.partition("## By example")[2].splitlines() if line.startswith('{"')]
    rows = [row(json.loads(example)) for example in examples[:9]]
    assert [found.taken.left for found in rows] == [()] * 9
    assert rows[-2].source == "riddles"
