"""The example data: reproducible to the byte, and correct as far as a program can check."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from inspect import isfunction
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
NUMBER = re.compile(r"\d+")
WORD = re.compile(r"\w+|[^\w\s]")
KINDS = {
    "word_problem",
    "unit_conversion",
    "translate_french",
    "grammar_fix",
    "synonym_antonym",
    "sentiment",
    "python_function",
    "sql_query",
    "json_extract",
    "polite_email",
    "ordering",
    "geography",
}
UNIT_FACTORS = {
    ("kilometres", "metres"): 1000,
    ("metres", "centimetres"): 100,
    ("kilograms", "grams"): 1000,
    ("litres", "millilitres"): 1000,
    ("centimetres", "millimetres"): 10,
    ("hours", "minutes"): 60,
    ("minutes", "seconds"): 60,
    ("weeks", "days"): 7,
    ("days", "hours"): 24,
    ("feet", "inches"): 12,
    ("yards", "feet"): 3,
    ("pounds", "ounces"): 16,
    ("gallons", "pints"): 8,
}
# Part of the request, the arguments of a call, the result.
POOL_CALLS: list[tuple[str, tuple[object, ...], object]] = [
    ("reverses the letters", ("abc",), "cba"),
    ("palindrome", ("level",), True),
    ("removes duplicates", (["b", "a", "b"],), ["b", "a"]),
    ("swaps the keys", ({"a": "b"},), {"b": "a"}),
    ("longest word", (["a", "abc", "ab"],), "abc"),
    ("counts the vowels", ("Audio",), 4),
    ("flattens", ([[1], [2, 3]],), [1, 2, 3]),
    ("start with a prefix", (["ab", "b"], "a"), ["ab"]),
    ("where the second wins", ({"a": 1}, {"a": 2}), {"a": 2}),
    ("last dot", ("a.tar.gz",), "gz"),
    ("initials", ("Ada Lovelace",), "AL"),
    ("has duplicates", (["a", "a"],), True),
    ("strips the newline", (["a\n"],), ["a"]),
    ("removes a key", ({"a": 1, "b": 2}, "a"), {"b": 2}),
    ("every word in a title", ("the old mill",), "The Old Mill"),
    ("not in another", ([1, 2], [2]), [1]),
    ("rotates", ([1, 2, 3],), [2, 3, 1]),
    ("replaces tabs", ("a\tb",), "a b"),
    ("slug", ("Hello World",), "hello-world"),
    ("neighbouring pairs", ([1, 2, 3],), [(1, 2), (2, 3)]),
    ("shortest string", ([],), None),
]
TARGET_CALLS: list[tuple[str, tuple[object, ...], object]] = [
    ("chunks", ([1, 2, 3, 4, 5], 2), [[1, 2], [3, 4], [5]]),
    ("transpose", ([[1, 2], [3, 4], [5, 6]],), [[1, 3, 5], [2, 4, 6]]),
    ("final four", ("AB123456",), "****3456"),
    ("add dots", ("a long tale", 6), "a long..."),
    ("add dots", ("short", 5), "short"),
    ("count the words", ("one  two three",), 3),
    ("most frequent", (["a", "b", "c", "b"],), "b"),
    ("highest value", ({"a": 1, "b": 9, "c": 4},), "b"),
    ("by turns", ([1, 3], [2, 4]), [1, 2, 3, 4]),
    ("second largest", ([5, 9, 9, 2],), 5),
    ("head of a list", ([1, 2, 3],), (1, [2, 3])),
    ("two bounds", (5, 1, 3), 3),
    ("two bounds", (0, 1, 3), 1),
    ("two bounds", (2, 1, 3), 2),
    ("digits of a number", (407,), 11),
    ("rising order", ([1, 2, 2, 5],), True),
    ("rising order", ([1, 3, 2],), False),
    ("punctuation", ("Well, well: 3!",), "Well well 3"),
    ("first letter", (["ant", "bee", "ape"],), {"a": ["ant", "ape"], "b": ["bee"]}),
    ("tally", (["x", "y", "x"],), {"x": 2, "y": 1}),
    ("order a list of records", ([{"n": 2}, {"n": 1}], "n"), [{"n": 1}, {"n": 2}]),
    ("is prime", (7,), True),
    ("is prime", (9,), False),
    ("is prime", (1,), False),
    ("in binary", (10,), "1010"),
    ("None values", ({"a": None, "b": 0},), {"b": 0}),
    ("comment lines", ("# a\nb\n#c\nd # e",), ["b", "d # e"]),
    ("URL query", ("a=x&b=y",), {"a": "x", "b": "y"}),
    ("camel case", ("max_row_count",), "maxRowCount"),
    ("running totals", ([1, 2, 3],), [1, 3, 6]),
]
SQL_TABLES = """
    CREATE TABLE books (author, genre, language);
    CREATE TABLE employees (name, department, city);
    CREATE TABLE orders (customer, status, courier);
    CREATE TABLE films (director, country, mood);
    CREATE TABLE pets (owner, species, colour);
    CREATE TABLE gardens (keeper, soil, style);
"""

Row = dict[str, Any]


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


POOL, TARGET = read("pool.jsonl"), read("target.jsonl")


def texts(row: Row, role: str) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == role]


def of_kind(kind: str) -> list[Row]:
    return [row for row in POOL if row["source"] == kind]


def exchanges(row: Row) -> list[tuple[str, str]]:
    return list(zip(texts(row, "user"), texts(row, "assistant"), strict=True))


def generate(out: Path, *options: str) -> None:
    command = [sys.executable, "-B", str(EXAMPLES / "make_examples.py"), "--out", str(out), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def test_committed_files_are_what_the_script_writes(tmp_path: Path) -> None:
    generate(tmp_path / "new")
    for name in ("pool.jsonl", "target.jsonl"):
        assert (tmp_path / "new" / name).read_bytes() == (EXAMPLES / name).read_bytes()


def test_another_seed_writes_other_rows(tmp_path: Path) -> None:
    generate(tmp_path, "--seed", "1")
    for name in ("pool.jsonl", "target.jsonl"):
        assert (tmp_path / name).read_bytes() != (EXAMPLES / name).read_bytes()


def test_counts_and_kinds() -> None:
    assert Counter(row["source"] for row in POOL) == dict.fromkeys(KINDS, 50)
    assert Counter(row["source"] for row in TARGET) == {"python_function": 24}
    assert sum(len(row["messages"]) == 4 for row in POOL) == 10


def test_rows_have_the_chat_form() -> None:
    for row in POOL + TARGET:
        assert set(row) == {"id", "source", "messages"}
        assert [message["role"] for message in row["messages"]] in (["user", "assistant"], ["user", "assistant"] * 2)
        for message in row["messages"]:
            assert set(message) == {"role", "content"}
            assert message["content"] == message["content"].strip() != ""
            assert "{}" not in message["content"]


def test_pool_is_shuffled() -> None:
    assert len({row["source"] for row in POOL[:60]}) >= 10


def test_ids_prompts_and_rows_are_unique() -> None:
    rows = POOL + TARGET
    assert len({row["id"] for row in rows}) == len(rows)
    prompts = [prompt for row in rows for prompt in texts(row, "user")]
    assert [prompt for prompt, times in Counter(prompts).items() if times > 1] == []
    assert len({json.dumps(row["messages"]) for row in rows}) == len(rows)


def test_target_is_about_python_in_wordings_and_code_of_its_own() -> None:
    def openings(rows: list[Row]) -> set[str]:
        return {" ".join(texts(row, "user")[0].split()[:3]) for row in rows}

    def bodies(rows: list[Row]) -> set[str]:
        return {texts(row, "assistant")[0].partition("\n")[2] for row in rows}

    pool = of_kind("python_function")
    assert openings(pool).isdisjoint(openings(TARGET))
    assert (len(openings(pool)), len(openings(TARGET))) == (4, 6)
    assert bodies(pool).isdisjoint(bodies(TARGET))
    for i, row in enumerate(TARGET):
        assert row["id"] == f"target-{i:04d}"
        assert len(row["messages"]) == 2
        assert "Python" in texts(row, "user")[0]


def test_samples_are_short() -> None:
    for row in POOL + TARGET:
        replies = [len(WORD.findall(text)) for text in texts(row, "assistant")]
        shortest = 10 if row["source"] == "python_function" else 5
        assert shortest <= min(replies) <= max(replies) <= 45, row
        assert 12 <= sum(replies) + sum(len(WORD.findall(text)) for text in texts(row, "user")) <= 72, row


def test_only_two_kinds_are_about_numbers() -> None:
    for row in POOL:
        if row["source"] not in {"word_problem", "unit_conversion", "python_function"}:
            assert not any(NUMBER.search(message["content"]) for message in row["messages"]), row


def check_word_problem(row: Row) -> None:
    known: set[int] = set()
    for prompt, reply in exchanges(row):
        asked = {int(number) for number in NUMBER.findall(prompt)}
        known |= asked
        used: set[int] = set()
        equations = EQUATION.findall(reply)
        assert equations, row
        for left, sign, right, result in equations:
            a, b, c = int(left), int(right), int(result)
            # Each number comes from the question, an earlier step, or is the 2 of "half".
            assert {a, b} <= known | {2}, row
            assert c == {"+": a + b, "-": a - b, "*": a * b}.get(sign, a // b if b else None), row
            assert sign != "/" or a % b == 0, row
            assert c > 0, row
            known.add(c)
            used |= {a, b, c}
        assert asked <= used, row
        assert int(NUMBER.findall(reply)[-1]) == int(equations[-1][3]), row


def test_word_problems() -> None:
    openings: set[str] = set()
    for row in of_kind("word_problem"):
        check_word_problem(row)
        openings.add(NUMBER.sub("#", " ".join(texts(row, "user")[0].split()[1:5])))
    assert len(openings) >= 8


def test_unit_conversions() -> None:
    for row in of_kind("unit_conversion"):
        prompt, reply = exchanges(row)[0]
        amount = int(NUMBER.findall(prompt)[0])
        words = re.findall(r"[a-z]+", prompt)
        factor, found = next(
            (factor, small)
            for (big, small), factor in UNIT_FACTORS.items()
            if re.search(rf"\d {big}\b", prompt) and small in words
        )
        assert re.search(rf"\b{amount * factor} {found}\b", reply)
        assert {int(number) for number in NUMBER.findall(reply)} <= {1, amount, factor, amount * factor}


def load_function(row: Row) -> Callable[..., object]:
    """The one function that the reply defines."""
    (code,) = texts(row, "assistant")
    assert re.match(r"def \w+\(", code), row
    scope: dict[str, Any] = {}
    exec(compile(code, row["id"], "exec"), scope)
    (function,) = [value for name, value in scope.items() if name != "__builtins__"]
    assert isfunction(function), row
    return function


def run_calls(rows: list[Row], calls: list[tuple[str, tuple[object, ...], object]]) -> set[str]:
    """Compare each call with its result; the ids of the rows that were called."""
    called: set[str] = set()
    for task, arguments, expected in calls:
        (row,) = [row for row in rows if task in texts(row, "user")[0]]
        assert load_function(row)(*arguments) == expected, row
        called.add(row["id"])
    return called


def test_python_snippets_define_one_function_each() -> None:
    names = [load_function(row).__name__ for row in of_kind("python_function") + TARGET]
    assert len(set(names)) == len(names) == 74


def test_python_snippets_do_what_was_asked() -> None:
    assert len(run_calls(of_kind("python_function"), POOL_CALLS)) == 21
    assert run_calls(TARGET, TARGET_CALLS) == {row["id"] for row in TARGET}


def test_sql_runs() -> None:
    database = sqlite3.connect(":memory:")
    try:
        database.executescript(SQL_TABLES)
        # No string literals in double quotes: those pass in SQLite only.
        for row in of_kind("sql_query"):
            query = texts(row, "assistant")[0]
            assert '"' not in query
            database.execute(query)
    finally:
        database.close()


def test_json_replies_hold_words_of_the_prompt() -> None:
    for row in of_kind("json_extract"):
        prompt, reply = exchanges(row)[0]
        fields = json.loads(reply)
        assert len(fields) == 3
        for key, value in fields.items():
            assert key in prompt
            assert value in prompt


def test_orderings() -> None:
    for row in of_kind("ordering"):
        prompt, reply = exchanges(row)[0]
        if not prompt.startswith(("Arrange", "Put", "List")):
            continue
        given = prompt.rstrip(".").split(": ")[1].split(", ")
        answer = re.sub(r"^(.*: |.* are )", "", reply.rstrip(".")).split(", ")
        assert sorted(given) == sorted(answer)
        assert given != answer
        if prompt.startswith("Arrange"):
            assert answer == sorted(answer)
