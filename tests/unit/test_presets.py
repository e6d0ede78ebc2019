"""Ready-made targets: rows as each dataset has them become conversations, or are refused; the same are taken again."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from support import preset_rows
from support.preset_rows import SHOTS

from service.datasets.choosing import chosen
from service.datasets.presets import PRESETS, Preset, Spread
from service.datasets.rows.renderer import rendered
from service.datasets.rows.template import Rendered, RowTemplate
from service.datasets.values import InvalidRow
from service.http.errors import Unprocessable
from service.settings import UploadSettings

NOTICE = "SOME NOTICE. GUID 1-2-3\n-----\n"
SCORED = {("rajpurkar/squad", "validation"), ("google-research-datasets/tydiqa", "validation")}
ROWS = {**preset_rows.ROWS, "bbh": {**preset_rows.ROWS["bbh"], "copy": 1}}
READ = "Read the passage below and answer the question with a short phrase copied from the passage.\n\nPassage: "
EXPECTED = {
    "gsm8k": ("Two boxes of 3?", "It is 2*3 = 6.\nAnd 6 € more.\n#### 12"),
    "squad": (READ + "A golden statue stands on the dome.\n\nQuestion: What stands there?", "a golden statue"),
    "mmlu": (
        "The following is a multiple choice question about elementary mathematics.\n\nWhich is prime?"
        "\nA. 4\nB. 7\nC. 8\nD. 9\nAnswer:",
        "B. 7",
    ),
    "bbh": (
        "Sort the words.\n\nMore on that.\n\nQ: pear fig\nA:",
        "Let's think step by step.\nf is before p.\n\nSo the answer is fig pear.",
    ),
    "tydiqa": (READ + "ঢাকা বাংলাদেশের রাজধানী।\n\nQuestion: বাংলাদেশের রাজধানী কোনটি?", "ঢাকা"),
    "codex": (
        "Complete the following Python function. Reply with the body only.\n\nimport math\ndef half(n):\n\treturn n / 2 \n"
        'def area(r): # of a circle\n  """Write a function to find an area.\n  assert area(2) == 4\n  assert area(0) == 0\n  """',
        "  x = half(2 * r)\n\n  return x ** 2",
    ),
}


def made(name: str, *rows: dict[str, Any]) -> list[tuple[str, str] | InvalidRow]:
    """What the preset's template makes of each row, in the process that makes it of uploads."""
    template = RowTemplate.parse(json.dumps(PRESETS[name].template))
    found = rendered(enumerate(rows, 1), template, UploadSettings())
    return [(row.user, row.assistant) if isinstance(row, Rendered) else row for _, row in found]


@pytest.mark.parametrize("name", PRESETS)
def test_a_row_as_the_dataset_has_it_becomes_a_conversation(name: str) -> None:
    assert made(name, ROWS[name]) == [EXPECTED[name]]


def test_a_function_that_is_put_together_again_is_python() -> None:
    ((user, reply),) = (each for each in made("codex", ROWS["codex"]) if not isinstance(each, InvalidRow))
    scope: dict[str, Any] = {}
    exec(user.partition("\n\n")[2] + "\n" + reply, scope)
    assert (scope["area"](2), scope["area"].__doc__.splitlines()[0]) == (4, "Write a function to find an area.")


def test_each_exemplar_of_a_task_is_a_sample_of_its_own() -> None:
    copies = [{**ROWS["bbh"], "copy": copy} for copy in (2, 3)]
    noticed = [{**row, "chain_of_thought_prompt": NOTICE + SHOTS} for row in copies]
    found = made("bbh", *copies)
    assert found == made("bbh", *noticed)
    assert found == [
        (
            "Sort the words.\n\nMore on that.\n\nQ: List: b a\nOptions:\n(A) a b\nA:",
            "Let's think step by step.\na: first. So the answer is (A).",
        ),
        ("Sort the words.\n\nMore on that.\n\nQ: ö o\nA:", "Let's think step by step.\nSo the answer is o ö."),
    ]


def test_exemplars_in_other_words_are_told_apart_too() -> None:
    text = (
        SHOTS.replace("Q: ", "QUESTION: ")
        .replace("A: Let's", "Let's")
        .replace("So the answer is fig pear.", "ANSWER: fig pear")
    )
    ((user, reply),) = (
        each for each in made("bbh", {**ROWS["bbh"], "chain_of_thought_prompt": text}) if isinstance(each, tuple)
    )
    assert (user, reply[-18:]) == (EXPECTED["bbh"][0], "\n\nANSWER: fig pear")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gsm8k", {"answer": None}),
        ("gsm8k", {"answer": "6 <<2*3=6"}),
        ("squad", {"answers": {"text": [], "answer_start": []}}),  # as unanswerable ones have it
        ("squad", {"context": None}),
        ("tydiqa", {"answers": None}),
        ("mmlu", {"answer": -1}),  # as a class label that is not public
        ("mmlu", {"answer": 4, "choices": ["1", "2", "3", "4", "5"]}),
        ("mmlu", {"choices": ["1"]}),
        ("mmlu", {"subject": None}),
        ("bbh", {"chain_of_thought_prompt": "Q: a\nA: b"}),
        ("bbh", {"copy": 4}),
        ("bbh", {"chain_of_thought_prompt": "Sort.\n\nQ: a b"}),
        ("codex", {"code": "area = 3"}),
        ("codex", {"code": "def area(r): return r"}),
        ("codex", {"text": None}),
    ],
)
def test_a_row_of_another_form_is_no_sample(name: str, fields: dict[str, Any]) -> None:
    (found,) = made(name, {**ROWS[name], **fields})
    assert isinstance(found, InvalidRow)
    assert "template." in str(found)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_no_preset_takes_what_its_benchmark_scores_by(preset: Preset) -> None:
    assert "test" not in preset.hub.split
    assert (preset.hub.id, preset.hub.split) not in SCORED
    assert 0 < preset.count <= preset.samples
    read = RowTemplate.parse(json.dumps(preset.template)).names & ROWS[preset.name].keys()
    assert read, "it reads nothing of a row"
    if preset.spread is not None:
        assert preset.spread.column in ROWS[preset.name]


def table(sizes: dict[str, int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a dataset that is in the order of its languages, as TyDi QA is."""
    ids = (f"{language}-{i}" for language, size in sizes.items() for i in range(size))
    return enumerate(({"id": id, "question": "ß"} for id in ids), 1)


SIZES = {"arabic": 500, "bengali": 30, "finnish": 2, "telugu": 300}


def taken(count: int, seed: int = 0, sizes: dict[str, int] = SIZES, name: str = "tydiqa") -> list[dict[str, Any]]:
    return [row for _, row in chosen(table(sizes), PRESETS[name], count, seed)]


def test_samples_are_spread_over_what_the_preset_says() -> None:
    assert Counter(row["source"] for row in taken(4)) == dict.fromkeys(SIZES, 1)
    assert Counter(row["source"] for row in taken(41)) == {"arabic": 13, "bengali": 13, "finnish": 2, "telugu": 13}
    assert all(row["id"].startswith(row["source"]) and row["question"] == "ß" for row in taken(41))
    assert sum(SIZES.values()) == len(taken(10_000)) == len({row["id"] for row in taken(10_000)})
    drawn = taken(200, name="squad")
    assert {row["source"] for row in drawn} == {"squad"}
    assert 80 < sum(row["id"].startswith("arabic") for row in drawn) < 160  # 120 on average


def test_the_same_are_taken_again_and_others_with_another_seed() -> None:
    assert taken(24) == taken(24)
    assert taken(48)[:24] == taken(24)
    ids = [{row["id"] for row in taken(24, seed)} for seed in (0, 1)]
    assert len(ids[0] & ids[1]) < 12


def test_rows_without_an_id_get_their_number_and_copies_are_told_apart() -> None:
    rows = [(number, {"dataset_name": task}) for number, task in enumerate("abc", 1)]
    found = [row for _, row in chosen(rows, PRESETS["bbh"], 6, 0)]
    assert Counter(row["source"] for row in found) == {"a": 2, "b": 2, "c": 2}
    assert all(row["id"] == f"bbh-{'abc'.index(row['source']) + 1}-{row['copy']}" for row in found)
    assert {row["id"] for _, row in chosen(rows, PRESETS["bbh"], 100, 0)} == {
        f"bbh-{n}-{c}" for n in (1, 2, 3) for c in (1, 2, 3)
    }


@pytest.mark.parametrize("row", [{"id": 7}, {"question": "a"}, InvalidRow("contains an unreadable value")])
def test_a_split_of_another_form_is_named(row: Any) -> None:
    with pytest.raises(Unprocessable, match="row 2 of google-research-datasets/tydiqa") as error:
        list(chosen([(1, {"id": "thai-1"}), (2, row)], PRESETS["tydiqa"], 4, 0))
    assert error.value.problem_code == "invalid_rows"


def test_the_value_before_a_mark_is_what_samples_are_spread_over() -> None:
    whole = PRESETS["tydiqa"].model_copy(update={"spread": Spread(over="row", column="id")})
    assert {row["source"] for _, row in chosen(table({"thai": 3}), whole, 3, 0)} == {"thai-0", "thai-1", "thai-2"}
